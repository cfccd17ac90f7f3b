"""How many labels of each level to buy.

labelled files ──costs──▶ CPU seconds a label ─┐
                                               ├─▶ plan: labels of each level, error and its interval
reports of studies ──curves──▶ posteriors ─────┘        └─▶ buy a third ─▶ outcome ─▶ the next plan
"""
