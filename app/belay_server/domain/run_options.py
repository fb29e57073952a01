"""Describe the options that a client sets for a run, and the arguments of its attempts. No I/O.

Every way to create a run (the REST API, protocol commands, agent runs, crons) makes `RunOptions`.
`services.runs.kwargs` merges them with the assistant's into `RunKwargs`, which are stored with the
run and read by the worker that executes it.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self
from uuid import UUID

#: The keys of `configurable` that LangGraph's server has for `langsmith_tracer`.
LANGSMITH_PROJECT, LANGSMITH_EXAMPLE = "__langsmith_project__", "__langsmith_example_id__"


class MultitaskStrategy(enum.StrEnum):
    """What happens to a new run if its thread already has an active run."""

    REJECT = "reject"
    INTERRUPT = "interrupt"
    ROLLBACK = "rollback"
    ENQUEUE = "enqueue"


class Durability(enum.StrEnum):
    """When LangGraph stores checkpoints: before the next step, while it executes, or at the end."""

    SYNC = "sync"
    ASYNC = "async"
    EXIT = "exit"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """The options that a client sets when it creates a run.

    The names are those of the create-run request of LangGraph's server. JSON objects in it are not
    changed after they were validated.
    """

    #: An assistant's id, or the name of a graph.
    assistant_id: str
    #: The id that the client chose for the run.
    run_id: UUID | None = None
    input: Any = None
    #: `update`, `resume` and `goto`. None if it has none of them.
    command: dict[str, Any] | None = None
    config: dict[str, Any] | None = None
    context: dict[str, Any] | None = None
    metadata: dict[str, Any] | None = None
    #: `checkpoint_id`, `checkpoint_ns` and `checkpoint_map`.
    checkpoint: dict[str, Any] | None = None
    checkpoint_id: UUID | str | None = None
    #: Names of nodes, or `["*"]` for all.
    interrupt_before: list[str] | None = None
    interrupt_after: list[str] | None = None
    stream_mode: list[str] | None = None
    stream_subgraphs: bool | None = None
    stream_resumable: bool | None = None
    multitask_strategy: str = MultitaskStrategy.ENQUEUE
    #: `create` or `reject`: what to do if the thread does not exist.
    if_not_exists: str | None = None
    #: `delete` or `keep`: what to do with a stateless run's thread.
    on_completion: str | None = None
    #: `cancel` or `continue`.
    on_disconnect: str | None = None
    #: Delays the start, in seconds.
    after_seconds: float | None = None
    #: The time limit of one attempt, in seconds.
    timeout_seconds: float | None = None
    durability: str | None = None
    #: False is an older spelling of `durability="exit"`.
    checkpoint_during: bool | None = None
    webhook: str | None = None
    #: Fail when `command.resume` answers an interrupt that is not pending.
    strict_resume: bool | None = None
    feedback_keys: list[str] | None = None
    #: `project_name` and `example_id` of LangSmith.
    langsmith_tracer: dict[str, Any] | None = None
    #: The JSON Schema of `structured` in the graph's output. Only agent runs have one.
    output_schema: dict[str, Any] | None = None

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Self:
        """Make options from validated JSON. Other keys and nulls are left out."""
        return cls(**{k: v for k, v in document.items() if k in _OPTIONS and v is not None})

    @property
    def strategy(self) -> MultitaskStrategy:
        return MultitaskStrategy(self.multitask_strategy)

    @property
    def resumes(self) -> bool:
        """Whether the run resumes its thread after an interrupt."""
        return self.command is not None and self.command.get("resume") is not None

    @property
    def named_nodes(self) -> list[str]:
        """The nodes that the options name, in no particular order."""
        goto = (self.command or {}).get("goto") or []
        targets = goto if isinstance(goto, list) else [goto]
        return [
            *(self.interrupt_before or []),
            *(self.interrupt_after or []),
            *(target["node"] if isinstance(target, dict) else target for target in targets),
        ]


_OPTIONS = frozenset(option.name for option in dataclasses.fields(RunOptions))


@dataclass(frozen=True, slots=True, kw_only=True)
class RunKwargs:
    """The arguments of an attempt: a run's `kwargs`, as LangGraph's server shows them."""

    config: dict[str, Any]
    context: dict[str, Any] = field(default_factory=dict)
    input: Any = None
    command: dict[str, Any] | None = None
    stream_mode: list[str] = field(default_factory=lambda: ["values"])
    interrupt_before: list[str] | None = None
    interrupt_after: list[str] | None = None
    webhook: str | None = None
    feedback_keys: list[str] | None = None
    #: Whether the run has its own thread, which is deleted with it.
    temporary: bool = False
    #: Whether the events of subgraphs are streamed too.
    subgraphs: bool = False
    #: Whether clients may resume the stream after one of its events.
    resumable: bool = False
    checkpoint_during: bool = True
    durability: str = Durability.ASYNC
    strict_resume: bool = False
    output_schema: dict[str, Any] | None = None

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Self:
        """Read what `to_document` has written. Keys of other versions of Belay are left out."""
        return cls(**{k: v for k, v in document.items() if k in _KWARGS})

    def to_document(self) -> dict[str, Any]:
        """Return the JSON that is stored and shown.

        The two keys that LangGraph's server does not have are included only if they are set.
        """
        document = {name: getattr(self, name) for name in _SHOWN}
        if self.strict_resume:
            document["strict_resume"] = True
        if self.output_schema is not None:
            document["output_schema"] = self.output_schema
        return document

    @property
    def configurable(self) -> dict[str, Any]:
        configurable: dict[str, Any] = self.config["configurable"]
        return configurable

    @property
    def starts_at_checkpoint(self) -> bool:
        """Whether the run starts at a given checkpoint instead of the newest state."""
        return bool(
            self.configurable.get("checkpoint_id") or self.configurable.get("checkpoint_ns")
        )

    @property
    def writes_behind(self) -> bool:
        """Whether a checkpoint may be stored while the next step already runs."""
        return self.durability == Durability.ASYNC

    @property
    def may_pause(self) -> bool:
        """Whether the run has `interrupt_before` or `interrupt_after`."""
        return bool(self.interrupt_before or self.interrupt_after)


_KWARGS = frozenset(argument.name for argument in dataclasses.fields(RunKwargs))
_SHOWN = (
    "input",
    "command",
    "config",
    "context",
    "stream_mode",
    "interrupt_before",
    "interrupt_after",
    "webhook",
    "feedback_keys",
    "temporary",
    "subgraphs",
    "resumable",
    "checkpoint_during",
    "durability",
)
