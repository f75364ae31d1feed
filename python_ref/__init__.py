"""The oracle: plain equations in any float dtype, and the only definition of "close".

Imported by tests and benchmarks alone, and imports nothing of the package that it judges.
"""
