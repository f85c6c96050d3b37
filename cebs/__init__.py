"""What the stages share; what is in which room stands in README.md, under "The code"."""

import os
import warnings

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # TRL would report each training run
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# peft 0.21 and TRL 1.16 themselves ask transformers 5.23 for the old name
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
