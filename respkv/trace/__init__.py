"""Traces of requests: to record, to make, to replay against a server and to simulate without one."""
