"""The CUDA kernels without a framework: a cell becomes CUDA C++, a problem a plan, both one text, NVRTC a kernel.

emit.py       cell -> CUDA C++
plan.py       the numbers of a kernel: tiles, cluster, registers, shared memory
registers.py  what a thread needs of them, about
fused.py      problem, architecture -> plan, R on the chip       streamed.py  the same, R streamed where it does not fit
model.py      plan, problem -> about the time of a step
source.py     plan -> one text
compile.py    text -> cubin, cached
launch.py     pointers, stream -> launch
product.py    dR and db of all steps
kernels/      the device code, forward and backward in one skeleton: scan.cuh, and the rooms it names
"""
