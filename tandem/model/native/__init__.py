"""The decode step in C, at the speed of the memory bus; read program.py, then step.c with model.h, then gemm.c with vec.h.

Products read the module's own weights (fp32, fp16, bf16, or int8 by `quantise`) and add in an order that depends neither
on the batch nor on the threads. Without a C compiler `available()` says why not, and torch does the work.
"""

from tandem.model.native.build import available
from tandem.model.native.int8 import Int8Linear, quantise
from tandem.model.native.products import linear
from tandem.model.native.program import Program, program_for

__all__ = ["Int8Linear", "Program", "available", "linear", "program_for", "quantise"]
