"""`ray job submit --working-dir . -- python jobs/embed.py configs/search-embeddings.yaml [key=value …]`: vectors only.

The cluster that runs the job does the work, whatever `runtime.address` says. Exits as `resnet-batch run` does.
"""

import sys

from pipeline.cli import main

if __name__ == "__main__":
    sys.argv[1:] = ["run", *sys.argv[1:], "output.predictions=false", "output.embeddings=true"]
    main()
