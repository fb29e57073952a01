"""A retriever over a file that all processes share, as they would share a vector database."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager

from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import RunnableConfig

from retrieval_graph.configuration import IndexConfiguration


class FileRetriever(BaseRetriever):
    path: str
    user_id: str
    limit: int

    def add(self, documents: list[Document]) -> None:
        rows = [(self.user_id, one.id, one.page_content) for one in documents]
        with closing(sqlite3.connect(self.path)) as database, database:
            database.execute("CREATE TABLE IF NOT EXISTS document (user, id, content)")
            database.executemany("INSERT INTO document VALUES (?, ?, ?)", rows)

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun
    ) -> list[Document]:
        with closing(sqlite3.connect(self.path)) as database:
            rows = database.execute(
                "SELECT id, content FROM document WHERE user = ?", (self.user_id,)
            ).fetchall()
        words = Counter(query.split())
        found = [(sum((words & Counter(text.split())).values()), key, text) for key, text in rows]
        best = sorted(found, key=lambda one: -one[0])[: self.limit]
        return [Document(text, id=key) for score, key, text in best if score]


@contextmanager
def make_retriever(config: RunnableConfig) -> Iterator[FileRetriever]:
    configuration = IndexConfiguration.from_runnable_config(config)
    if not configuration.user_id:
        raise ValueError("Please provide a valid user_id in the configuration.")
    limit = config["configurable"].get("search_limit", 2)
    yield FileRetriever(path=configuration.index_path, user_id=configuration.user_id, limit=limit)
