"""Which part of the product imports which: `python tests/architecture.py [TREE]`.

A *room* is a module or a package directly below `kvfetcher`; every module inside a package belongs
to that room. Imports count wherever they stand: at the top, inside functions and under
`TYPE_CHECKING`, since a reader follows all of them. TREE is the folder of the package (default:
`python_backends/kvfetcher`), so that two commits are measured by the same command.
"""

import ast
import sys
from collections import Counter, defaultdict
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "python_backends" / "kvfetcher"


def imports(tree: Path) -> set[tuple[str, str]]:
    """Pairs (importing module, imported module) within `tree`, dotted, without the package name."""
    files = {}
    for path in tree.rglob("*.py"):
        parts = path.relative_to(tree).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    found = set()
    for name, path in files.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                targets = [(node.module or "", alias.name) for alias in node.names]
            elif isinstance(node, ast.Import):
                targets = [(alias.name, "") for alias in node.names]
            else:
                continue
            for module, attribute in targets:
                if module != tree.name and not module.startswith(f"{tree.name}."):
                    continue
                target = module[len(tree.name) + 1 :]
                inner = f"{target}.{attribute}".strip(".")
                target = inner if inner in files else target
                if target and target != name:
                    found.add((name, target))
    return found


def between_children(pairs: set[tuple[str, str]], folder: str = "") -> Counter[tuple[str, str]]:
    """Imports between the direct children of `folder`, with the number of module pairs of each."""
    prefix = f"{folder}." if folder else ""
    edges: Counter[tuple[str, str]] = Counter()
    for source, target in pairs:
        if source.startswith(prefix) and target.startswith(prefix):
            a, b = (name[len(prefix) :].split(".")[0] for name in (source, target))
            if a != b:
                edges[a, b] += 1
    return edges


def cycles(edges: Counter[tuple[str, str]]) -> list[list[str]]:
    """Groups of names of which each reaches each other, sorted."""
    after = defaultdict(set)
    for a, b in edges:
        after[a].add(b)

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        todo = [start]
        while todo:
            todo += (news := after[todo.pop()] - seen)
            seen |= news
        return seen

    reach = {name: reached(name) for name in {name for edge in edges for name in edge}}
    groups = {tuple(sorted({b for b in reach[a] if a in reach[b]})) for a in reach if a in reach[a]}
    return sorted(list(group) for group in groups)


def fewest_upward(edges: Counter[tuple[str, str]]) -> int:
    """Number of module pairs that point upwards in the best order of the names there is."""
    total = 0
    for group in cycles(edges):
        # best[S]: fewest upward imports with the names of S lowest; exact, over all subsets
        inner = [[edges[a, b] for b in group] for a in group]
        best = [0] + [sys.maxsize] * ((1 << len(group)) - 1)
        for low in range(1 << len(group)):
            for i in range(len(group)):
                if not low >> i & 1:
                    up = sum(w for j, w in enumerate(inner[i]) if j != i and not low >> j & 1)
                    best[low | 1 << i] = min(best[low | 1 << i], best[low] + up)
        total += best[-1]
    return total


def folders(pairs: set[tuple[str, str]]) -> list[str]:
    """Every package with modules of its own, the root as the empty name."""
    return sorted({name.rpartition(".")[0] for pair in pairs for name in pair})


def code_lines(tree: Path) -> int:
    """Number of lines that hold code: without blank lines, comments and docstrings."""
    count = 0
    for path in tree.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        dropped = set()
        for node in ast.walk(ast.parse(text)):
            body = getattr(node, "body", None)
            if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
                value = body[0].value
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    dropped |= set(range(value.lineno, (value.end_lineno or value.lineno) + 1))
        for number, line in enumerate(text.splitlines(), 1):
            stripped = line.strip()
            count += bool(stripped) and not stripped.startswith("#") and number not in dropped
    return count


def main(tree: Path) -> None:
    """Print the figures of `tree`: rooms, imports between them, upward imports, cycles."""
    pairs = imports(tree)
    edges = between_children(pairs)
    rooms = {name for edge in edges for name in edge}
    print(f"rooms                   {len(rooms)}")
    print(f"imports between rooms   {len(edges)} (of {sum(edges.values())} pairs of modules)")
    print(f"upward imports          {fewest_upward(edges)}")
    for folder in folders(pairs):
        for group in cycles(between_children(pairs, folder)):
            print(f"cycle in {folder or 'the root':<16}{', '.join(group)}")
    print(f"lines of code           {code_lines(tree)}")
    if "--edges" in sys.argv:
        for (a, b), count in sorted(edges.items()):
            print(f"{a} -> {b}  {count}")


if __name__ == "__main__":
    named = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
    main(Path(named[0]).resolve() if named else PACKAGE)
