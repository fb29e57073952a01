-- Several callers with webhooks at the same host do not wait for each other.
CREATE INDEX webhook_call_host_caller ON webhook_call (host, caller, next_attempt_at);
DROP INDEX webhook_call_host;
