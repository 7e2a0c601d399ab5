"""The decode step in C, at the speed of the memory bus; read program.py, then step.c with model.h, then gemm.c with vec.h.

Products read the module's own weights (fp32, fp16, bf16, or int8 by `quantise`) and add in an order that depends neither
on the batch nor on the threads. Without a C compiler `available()` says why not, and torch does the work.
"""

from tandem.model.native.build import available
from tandem.model.native.linear import linear
from tandem.model.native.program import Program, program_for
from tandem.model.native.quantise import Int8Linear, quantise

__all__ = ["Int8Linear", "Program", "available", "linear", "program_for", "quantise"]
