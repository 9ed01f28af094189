"""The report's figures: inline SVG made of lines and text, coloured by the page's style sheet.

Text is escaped here; numbers that are not finite are left out. The reference has the class `s0` in every figure, the
variants `s1`, `s2` ... in the order of the report.
"""
