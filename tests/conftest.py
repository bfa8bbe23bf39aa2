"""For every test: hypothesis sets no deadline, since a busy machine is no failing test."""

from hypothesis import settings

settings.register_profile("memsvc", deadline=None)
settings.load_profile("memsvc")
