"""Pages of the public names, read from the package's source; nothing of it is imported.

A name of `vlm_lit` gets its signature, its docstring and a table of its parameters. What a
parameter means is the comment after it, as nbdev has it; for a field of a dataclass it may also be
the help in its default.
"""

import ast, io, re, tokenize
from pathlib import Path

import build

PACKAGE = build.ROOT / "vlm_lit"
ROOMS = {  # caption -> first parts of module names, in the order of the layers
    "Core": "core files",
    "Debugging": "debug",
    "Text": "text",
    "Images": "images image_processor padding processor",
    "Data": "data",
    "Models": "models",
    "Weights": "weights",
    "Evaluation": "evaluation",
    "Training": "training",
    "Command line": "walk reports commands cli",
}

def caption(module):
    "Caption of the room that a module is in; a new room has its own name."
    room = module.split(".")[0]
    found = [text for text, rooms in ROOMS.items() if room in rooms.split()]
    return found[0] if found else room.replace("_", " ").capitalize()

def public_names():
    "`{name: module}` of the names that the package loads when they are first used."
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and node.targets[0].id == "_MODULES":
            modules = ast.literal_eval(node.value)
            return {name: module for module, names in modules.items() for name in names.split()}
    raise SystemExit("vlm_lit/__init__.py: no table _MODULES")

class Module:
    "A module's source: its definitions, its comments, and the cells that they come from."

    def __init__(self, name):
        self.name = name
        self.path = PACKAGE / (name.replace(".", "/") + ".py")
        text = self.path.read_text(encoding="utf-8")
        self.lines = text.splitlines()
        self.tree = ast.parse(text)
        self.comments = {}  # line -> text of its comment
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT:
                self.comments[token.start[0]] = token.string.lstrip("# ").strip()

    def find(self, name):
        "The top-level node that defines a name."
        for node in self.tree.body:
            if getattr(node, "name", None) == name: return node
            targets = getattr(node, "targets", [getattr(node, "target", None)])
            if any(isinstance(t, ast.Name) and t.id == name for t in targets):
                return node
        raise SystemExit(f"{self.path.name} does not define {name}")

    def cell(self, node):
        "Notebook and id of the cell that a node comes from."
        for line in reversed(self.lines[: node.lineno]):
            if match := re.match(r"# %% \S*?([^/]+)\.ipynb #(\w+)", line):
                return match.groups()
        raise SystemExit(f"{self.path.name}:{node.lineno}: no cell is named before this line")

    def comment(self, node):
        "The comment after a node, or on lines of its own before it."
        if text := self.comments.get(node.end_lineno): return text
        above, line = [], node.lineno - 1
        while line in self.comments and self.lines[line - 1].lstrip().startswith("#"):
            if "# %%" in self.lines[line - 1]: break
            above.insert(0, self.comments[line])
            line -= 1
        return " ".join(above)

class Parameter:
    "A row of the table: what is passed, and what it means."

    def __init__(self, name, kind="", default="", meaning=""):
        self.name, self.kind, self.default, self.meaning = name, kind, default, meaning

def unparse(node): return ast.unparse(node) if node is not None else ""

def annotation(node):
    "A type as text; one that is written as a string loses its quotes."
    return node.value if isinstance(getattr(node, "value", None), str) else unparse(node)

def parameters(module, function, is_method):
    "Parameters of a function, with their comments."
    args = function.args
    plain = [*args.posonlyargs, *args.args]
    defaults = [None] * (len(plain) - len(args.defaults)) + args.defaults
    rows = list(zip(plain, [""] * len(plain), defaults))
    if args.vararg: rows.append((args.vararg, "*", None))
    rows += zip(args.kwonlyargs, [""] * len(args.kwonlyargs), args.kw_defaults)
    if args.kwarg: rows.append((args.kwarg, "**", None))
    if is_method: rows = rows[1:]
    found = []
    for arg, stars, default in rows:
        meaning = module.comment(default if default is not None else arg)
        own = Parameter(stars + arg.arg, annotation(arg.annotation), unparse(default), meaning)
        found.append(own)
    return found

def returned(module, function):
    "A row for what a function returns, or None."
    kind = annotation(function.returns)
    last = function.returns.end_lineno if function.returns else function.body[0].lineno - 1
    meaning = module.comments.get(last, "") if last < function.body[0].lineno else ""
    return Parameter("returns", kind, "", meaning) if meaning or kind not in ("", "None") else None

def words(node):
    "The text of a string in the source; what an f-string puts in is named."
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr): return "".join(map(words, node.values))
    if not isinstance(node, ast.FormattedValue): return ""
    names = [n.id for n in ast.walk(node) if isinstance(n, ast.Name)]
    return f"`{names[-1]}`"

def fields(module, node):
    "Annotated attributes of a class, with their comments or the help in their defaults."
    found = []
    for item in node.body:
        if not isinstance(item, ast.AnnAssign) or item.target.id.startswith("_"):
            continue
        kind, default, meaning = annotation(item.annotation), item.value, module.comment(item)
        if isinstance(default, ast.Call):
            helps = [words(arg) for arg in default.args[1:]]
            for keyword in default.keywords:
                inner = keyword.value
                if keyword.arg == "metadata" and isinstance(inner, ast.Dict):
                    helps += [words(value) for value in inner.values]
            meaning = meaning or next(filter(None, helps), "")
            given = [k.value for k in default.keywords if k.arg == "default"]
            default = next(iter([*given, *default.args[:1]]), None)
        found.append(Parameter(item.target.id, kind, unparse(default), meaning))
    return found

def escaped(text):
    "Text for Markdown: what stands in backticks is left, the rest is no markup."
    parts = re.split(r"(`[^`]*`)", text)
    for n, part in enumerate(parts):
        if n % 2 == 0:
            parts[n] = re.sub(r"([*_\[\]{}$~\\])", r"\\\1", part).replace("<", "&lt;")
    return "".join(parts)

def in_cell(text): return text.replace("|", r"\|").replace("\n", " ")

def code(text):
    return f"`` {in_cell(text)} ``" if "`" in text else f"`{in_cell(text)}`"

def table(rows, result=None):
    "The parameters as a table, what is returned in its last row."
    if not rows and result is None: return ""
    lines = ["| parameter | type | default | meaning |", "|---|---|---|---|"]
    for row in rows:
        cells = [code(row.name), *(code(text) if text else "" for text in (row.kind, row.default))]
        lines.append(f"| {' | '.join(cells)} | {in_cell(escaped(row.meaning))} |")
    if result:
        kind = code(result.kind) if result.kind else ""
        lines.append(f"| *returns* | {kind} |  | {in_cell(escaped(result.meaning))} |")
    return "\n".join(lines)

def signature(rows, result, keyword_only):
    "Names, types and defaults in one line."
    parts = []
    for row in rows:
        if row.name in keyword_only and not any(p.startswith("*") for p in parts):
            parts.append("*")
        kind = f": {row.kind}" if row.kind else ""
        equals = " = " if row.kind else "="
        parts.append(row.name + kind + (f"{equals}{row.default}" if row.default else ""))
    arrow = f" -> {result.kind}" if result and result.kind else ""
    return f"({', '.join(parts)}){arrow}"

def directive(kind, name, options, content, fence):
    "A directive of Sphinx's Python domain."
    options = "\n".join(f":{key}: {value}" for key, value in options.items())
    ticks = "`" * fence
    return f"{ticks}{{py:{kind}}} {name}\n{options}\n\n{content}\n{ticks}\n"

def doc(node): return escaped(ast.get_docstring(node) or "")

def function_text(module, node, name, *, is_method=False, extra="", fence=6):
    "A function or method as a directive."
    decorators = {unparse(d) for d in node.decorator_list}
    is_static = "staticmethod" in decorators
    rows = parameters(module, node, is_method and not is_static)
    result, options = returned(module, node), {}
    only = {arg.arg for arg in node.args.kwonlyargs}
    content = f"{doc(node)}\n\n{table(rows, result)}\n\n{extra}"
    if is_method and decorators & {"property", "cached_property"}:
        if node.returns: options["type"] = annotation(node.returns)
        meaning = f"\n\n{escaped(result.meaning)}" if result and result.meaning else ""
        return directive("property", name, options, doc(node) + meaning, fence)
    if "classmethod" in decorators: options["classmethod"] = ""
    if is_static: options["staticmethod"] = ""
    text = name + signature(rows, result, only)
    return directive("method" if is_method else "function", text, options, content, fence)

def is_public(node):
    "Whether a function of a class is shown: no private name, and documented."
    named = not node.name.startswith("_") or node.name == "__call__"
    return isinstance(node, ast.FunctionDef) and named and bool(ast.get_docstring(node))

def class_text(module, node, name, extra):
    "A class as a directive, with its fields, members and public methods."
    methods = [item for item in node.body if isinstance(item, ast.FunctionDef)]
    init = next((m for m in methods if m.name == "__init__"), None)
    rows = parameters(module, init, True) if init else fields(module, node)
    only = {arg.arg for arg in init.args.kwonlyargs} if init else set()
    shown = signature(rows, None, only) if init or len(rows) < 9 else "(...)"
    bases = [unparse(base) for base in node.bases]
    is_enum = "Enum" in " ".join(bases)
    if is_enum: shown, rows = "", enum_members(module, node)
    text = [doc(node)]
    if bases: text.append("Bases: " + ", ".join(f"`{base}`" for base in bases))
    text += [table(rows), extra]
    for method in filter(is_public, methods):
        text.append(function_text(module, method, method.name, is_method=True, fence=5))
    return directive("class", name + shown, {}, "\n\n".join(filter(None, text)), 6)

def enum_members(module, node):
    "Members of an enumeration, with their comments."
    items = [item for item in node.body if isinstance(item, ast.Assign)]
    return [
        Parameter(item.targets[0].id, "", unparse(item.value), module.comment(item))
        for item in items
    ]

def name_text(name, module):
    "The directive of a public name."
    node = module.find(name)
    notebook, cell = module.cell(node)
    extra = f"Defined in [{notebook}](#{notebook}-{cell}), module `vlm_lit.{module.name}`."
    if isinstance(node, ast.FunctionDef):
        return function_text(module, node, name, extra=extra)
    if isinstance(node, ast.ClassDef):
        return class_text(module, node, name, extra)
    meaning, value = escaped(module.comment(node)), unparse(node.value)
    options = {"value": value} if len(value) < 60 else {}
    return directive("data", name, options, f"{meaning}\n\n{extra}", 6)

def summary(name, module):
    "One line on a name, for the table of all."
    node = module.find(name)
    if isinstance(node, ast.Assign): return module.comment(node)
    return " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())

def rooms_of_names():
    "`{room: {name: module}}` of the public names, rooms in their order."
    found = {room: {} for room in ROOMS}
    for name, module in public_names().items():
        found.setdefault(caption(module), {})[name] = module
    return {room: names for room, names in found.items() if names}

def page_of(room):
    "Where the reference of a room is, without the ending."
    return f"api/{room.lower().replace(' ', '_')}"

def pages():
    "`{file: text}` of the reference: one page per room, and an index of all names."
    found, index, modules = {}, [], {}
    for room, names in rooms_of_names().items():
        # as a user writes it: `vlm_lit.preprocess`
        text = [f"# {room}\n", "```{py:currentmodule} vlm_lit\n```\n"]
        index.append(f"\n## {room}\n")
        for name, home in names.items():
            module = modules.setdefault(home, Module(home))
            text.append(name_text(name, module))
            line = summary(name, module)
            line = escaped(line[:1].upper() + line[1:])
            index.append(f"- {{py:obj}}`{name} <vlm_lit.{name}>`: {line}")
        found[f"{page_of(room)}.md"] = "\n".join(text)
    stems = [Path(name).stem for name in found]
    toctree = "\n\n```{toctree}\n:hidden:\n\n" + "\n".join(stems) + "\n```\n"
    head = "# Public names\n\n`from vlm_lit import NAME` imports each of them, and its module then."
    found["api/index.md"] = "\n".join([head, *index, toctree])
    return found
