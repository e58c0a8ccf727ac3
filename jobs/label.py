"""`ray job submit --working-dir . -- python jobs/label.py configs/nightly-labels.yaml [key=value …]`: labels only.

The cluster that runs the job does the work, whatever `runtime.address` says, and the columns are those set here. The
job's driver exits as `resnet-batch run` does; `ray job submit` itself makes 1 of 1, 2 and 3, and 0 of a stopped job.
"""

import sys

from pipeline.cli import main

if __name__ == "__main__":
    sys.argv[1:] = ["run", *sys.argv[1:], "output.predictions=true", "output.embeddings=false"]
    main()
