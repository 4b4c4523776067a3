"""Every tolerance of the suite, once. Relative to the largest magnitude of the expected array unless said.

float64: two orders of the same sum; the laws compare forms that reassociate at most a few thousand terms.
float32: eps 1.2e-7 times the square root of the terms reduced, with a factor ten for exp and division.
bfloat16: eps 2^-8 per rounding; outputs see a handful of roundings in a row.
"""

FLOAT64 = 1e-10
FLOAT32 = 2e-5
FLOAT32_GRAD = 1e-4
BFLOAT16 = 4e-2
FINITE_DIFFERENCE = 1e-5  # float64 central differences, step 1e-5
