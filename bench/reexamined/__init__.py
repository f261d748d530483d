"""The D3 paper (arXiv 2503.08524), re-examined: what bench/paper.py runs, a question a file.

averages      do the formulas give the printed layer averages and FLOPs ratios, and what at real lengths?
grid          Table 9's grid of start x alpha, at the lengths that answers really have
premise       do later tokens need fewer layers?
equal_bytes   every policy at the same mean bytes
"""
