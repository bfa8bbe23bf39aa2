"""Handlers of the public API: one class per group of calls, each taking the Application."""
