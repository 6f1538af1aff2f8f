"""What a user runs to trust a machine: parity, the doctor, benchmarks, other libraries beside ours."""
