"""What each command takes: dataclasses that are cheap to import, one module a command."""
