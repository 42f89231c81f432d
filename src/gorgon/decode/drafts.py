"""What is drafted: a drafter turns what the heads and the context say into the tree that the next step verifies.

A drafter sees one sequence at a time and works on the host; heads whose children depend on their parent's token would
expand a draft level by level behind the same interface.
"""

from __future__ import annotations

from typing import Protocol

from gorgon.core.draft import Draft
from gorgon.core.tree import DraftTree
from gorgon.decode.ngrams import NgramIndex
from gorgon.decode.step import HeadChoices


class Drafter(Protocol):
    """Proposes the nodes of the next step.

    Attributes:
        nodes: nodes of a draft at most, the root included; 1 is plain decoding.
        heads, width: how many heads it reads, and how many choices of each.
        copies: whether it looks at the context.
    """

    nodes: int
    heads: int
    width: int
    copies: bool

    def draft(self, root: int, choices: HeadChoices | None, context: NgramIndex | None) -> Draft:
        """The draft behind `root`, the token decided last (already the context's last token)."""
        ...


class StaticDrafter:
    """The same tree in every step: ranks of the heads, and a chain copied from the context while there is one."""

    def __init__(self, tree: DraftTree, heads: int = 0) -> None:
        """Args: heads: how many are read at least, whatever the tree needs: that is how reading them is timed."""
        self.tree = tree
        self.nodes, self.copies = tree.nodes, tree.ngram > 0
        self.heads, self.width = max(tree.heads, heads), max(tree.width, min(heads, 1))
        self._places = [(len(path) - 1, path[-1]) for path in tree.paths]
        shape = Draft(0)
        self._shapes = {shape.nodes: shape.holding([0])}
        for parent in tree.parents[1:]:
            shape.add(0, parent)
            self._shapes[shape.nodes] = shape.holding([0] * shape.nodes)

    def draft(self, root: int, choices: HeadChoices | None, context: NgramIndex | None) -> Draft:
        """The heads' tokens by rank, then what the context offers, as far as it goes."""
        # Looking up has the context indexed, so nothing is looked up without a branch.
        copied = context.propose(self.tree.ngram) if context is not None and self.copies else []
        if self._places and not self._can_read(choices):  # the last step was drafted otherwise, for another batch size
            draft = Draft(root)
            for token in copied:
                draft.add(token, draft.nodes - 1)
            return draft
        tokens = [root]
        if self._places:
            assert choices is not None
            tokens += [choices.token(head, rank) for head, rank in self._places]
        tokens += copied
        return self._shapes[len(tokens)].holding(tokens)

    def _can_read(self, choices: HeadChoices | None) -> bool:
        return choices is not None and choices.heads >= self.tree.heads and choices.width >= self.width
