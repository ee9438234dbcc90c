"""The CUDA kernels without a framework: a cell becomes CUDA C++, a problem a plan, both one text, NVRTC a kernel.

emit.py     cell -> CUDA C++          plan.py    problem, architecture -> tiles, cluster, shared memory
source.py   plan -> one text          compile.py text -> cubin, cached      launch.py  pointers, stream -> launch
kernels/    the device code, forward and backward in one skeleton: scan.cuh, and the rooms it names
"""
