"""`python -m qlora_core`, the same as `qlora`."""

from qlora_core.cli.main import main

main()
