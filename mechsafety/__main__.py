"""The command without its script: ``python -m mechsafety map demo --out out``."""

from mechsafety.cli import main

if __name__ == "__main__":
    main()
