"""The server: connections, sessions, and what each command does."""
