"""A small expert-parallel MoE decode engine to measure the balancer with: `python -m benchmarks.engine --help`.

config.py          sizes and options
routing.py         which experts each token of each step goes to: from a recorded trace, the same in every run
kernels.py         Triton kernels and their torch twins, grouped expert products
model.py           Engine: weights, one step, CUDA graph; usable as a library
stop_the_world.py  rebalancing as engines do in their synchronous mode, to compare with
serving.py         one rank's process: a mode, a loop of steps, measurements to files
results.py         from the files of all ranks to rows of a table; plots.py draws them
selfcheck.py       does a step do on this device what it should? Run it first
compare.py         are the outputs of two runs the same, bit for bit?
"""
