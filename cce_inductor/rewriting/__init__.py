"""The pass: it rewrites the graph that Dynamo captured, before autograd.

`rewrite` runs the steps in this order:

1. `walk` visits the nodes in order and carries logits as abstract values. It uses `regions`,
   `gradients`, `in_place` (with `mutation`), `escapes` and `routers`, and returns `findings`.
2. `returned` says which of the logits that the graph returns can be deferred.
3. `decide` chooses what is rewritten, and `plan` which statistics share an operator.
4. `record` writes the reports.
5. `build` inserts the new nodes, and `replace` erases the old ones.

Glossary (`patterns.language` explains logits, projection, transform, reduction, row, statistic,
late and escape):

- *Consumer*: a node that reduces logits or computes a loss. It can be replaced.
- *Origin*: the node that computes a projection. Logits that were joined have several.
- *Kept*: a projection that stays as it is, so its logits are stored.
- *Router*: a projection with a softmax over few columns, as a mixture of experts has. It is not
  taken for logits.
- *Place*: the node of the user's graph before which a result is computed.
- *Alias*: a node that holds the memory of another one: a view, or the result of a function that
  changes its argument in place.
- *Row view*: a view of logits with one value for each row, ``logits.diagonal()`` for example.
- *Storage*: the identity of a tensor's memory, which the tensor shares with its views.
- *Example*: the fake tensor that Dynamo keeps for a node.
- *Group*: statistics that one operator computes. Its *anchor* is the node before which it stands.
- *Deferred*: not returned by the graph. The caller gets a tensor that computes itself when needed.
"""
