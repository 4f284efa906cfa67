"`python -m decomp_nb …` is the command `decomp_nb`."
from decomp_nb.training.launch import main

if __name__ == "__main__":
    raise SystemExit(main())
