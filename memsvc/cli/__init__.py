"""The `memsvc` command. docs/cli.md lists its commands and exit codes."""
