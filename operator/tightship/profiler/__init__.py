"""What the profiling Job runs inside the engine image: start an engine, load it, measure, report.

Imports `tightship.api`, `tightship.core`, the standard library and what every vLLM image carries (httpx, pydantic); valid Python 3.10.
Time, the engine, the load's wire, the device and the report are ports, so the same sweep runs against a real engine, a simulated
one, or none.
"""
