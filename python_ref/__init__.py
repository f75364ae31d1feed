"""The oracle: plain equations in any float dtype.

Imported by tests and benchmarks alone, and imports nothing of the package that it judges; but compare.py has the
package's definition of "close", so that there is only one.
"""
