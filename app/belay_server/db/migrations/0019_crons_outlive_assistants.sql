-- The crons of other users than the one who deletes an assistant stay, disabled with the reason.
ALTER TABLE cron DROP CONSTRAINT cron_assistant_id_fkey;
