"""The command line `qlora`: one module per command. Light: a command imports what it needs when it runs."""
