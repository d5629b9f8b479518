"""Text and maths of a knowledge-aware benchmark: targets, rewriting, checks, agreement, the funnel. No Ray, no network.

A caption's target is a phrase for a thing that can be seen in its picture. A rewriter words the caption anew so that
the target is only described; checks refuse what names it, what changes the rest, and what fits another picture as well
(spec: SLQ section 5). The flow is `pipelines.karr`.
"""
