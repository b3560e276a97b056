"""``python -m pml_ext`` is ``pml-ext``."""

from pml_ext.commands.main import main

if __name__ == "__main__":
    main()
