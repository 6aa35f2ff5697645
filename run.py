"""One cell or a sweep: python run.py quant=gsrq bits=1 task=longbench; python run.py -m bits=0.5,1,2 quant=km,gsrq."""

import sys

from kvq.entry import main

if __name__ == "__main__":
    sys.exit(main())
