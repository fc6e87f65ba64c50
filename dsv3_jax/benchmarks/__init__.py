"""What `launch/bench.py` measures: kernels, training steps and decoding, against peers in the same run."""
