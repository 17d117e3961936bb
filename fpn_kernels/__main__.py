"""`python -m fpn_kernels`: versions, devices, and which backend serves which operator here."""

from fpn_kernels import diagnostics

if __name__ == "__main__":
    print(diagnostics.report())
