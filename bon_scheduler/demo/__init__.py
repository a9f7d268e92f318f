"""The whole service on one machine with nothing installed: a database, sample data, a mail server, SHAAM."""
