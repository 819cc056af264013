"""python -m megatron_sr1.cli"""

from megatron_sr1.cli import main

if __name__ == "__main__":
    main()
