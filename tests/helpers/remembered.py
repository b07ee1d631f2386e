"""An operation of Triton's language, interpreted as it was when it first met operands of these types.

The language is written for a compiler, to which a tensor is an opaque handle: what an operation asks of the builder
depends on the types of its tensors and on its other arguments, and on no element. So the requests are noted once, and
made again. What is made of constants alone is kept. An operation that looks into a tensor after all, as Triton's
interpreter lets it, is interpreted in full each time.
"""

from triton.language import core
from triton.runtime import interpreter

# What is asked of these depends on more than their arguments, or has an effect.
IMPURE = ("program", "load", "store", "atomic", "print", "assert", "assume", "barrier")
PLAIN = {int, bool, str, type(None), type(core.PropagateNan.ALL)}
Handle, semantic = interpreter.TensorHandle, interpreter.interpreter_semantic


class Unknown(Exception):
    """An argument that is no part of a key, or a result that cannot be made again."""


def install() -> None:
    """From here on each operation is remembered."""
    patch_operation, patch_tensor = interpreter._patch_attr, interpreter._patch_lang_tensor

    def patch_remembered(obj, name, *rest):
        patch_operation(obj, name, *rest)
        setattr(obj, name, remembered(getattr(obj, name)))

    def patch_watched(tensor, *rest):
        patch_tensor(tensor, *rest)
        for name in ("__bool__", "__index__"):
            setattr(tensor, name, watched(getattr(tensor, name)))

    interpreter._patch_attr, interpreter._patch_lang_tensor = patch_remembered, patch_watched


def remembered(plain):
    """The operation that `plain` interprets in full."""
    known = {}

    def call(*args, **kwargs):
        if type(semantic.builder) is Notes:  # it is part of another
            return plain(*args, **kwargs)
        handles = []
        try:
            key = key_of(args, handles)
            if kwargs:
                kwargs.pop("_semantic", None)
                key += key_of(kwargs.items(), handles)
            run = known[key]
        except Unknown:
            run = None
        except KeyError:
            if len({id(handle) for handle in handles}) == len(handles):  # what is one today may be two tomorrow
                result, known[key] = noted(plain, args, kwargs, handles)
                return result
            run = None
        return run(handles) if run else plain(*args, **kwargs)

    return call


def watched(plain):
    """A method of a tensor that tells its element."""

    def tell(self):
        if type(semantic.builder) is Notes:
            semantic.builder.look(self)
        return plain(self)

    return tell


def key_of(arguments, handles):
    """The types of the tensors, whose handles join `handles`, and what else the arguments are."""
    key = []
    for argument in arguments:
        kind = type(argument)
        if kind is core.tensor:
            handles.append(argument.handle)
            key.append(argument.type.name)
        elif kind in PLAIN:
            key.append((kind, argument))
        elif kind is float:
            key.append(argument.hex())  # NaN equals nothing
        elif kind is core.constexpr:
            key.append((kind, key_of([argument.value], handles)))
        elif kind in (tuple, list, core.tuple):
            key.append((kind, key_of(argument, handles)))
        elif isinstance(argument, core.dtype):
            key.append((kind, argument.name))
        elif kind is slice and argument == slice(None):
            key.append(kind)
        else:
            raise Unknown
    return tuple(key)


def noted(plain, args, kwargs, handles):
    """The result, and a function that makes such a result of other handles, or None."""
    builder = semantic.builder
    semantic.builder = notes = Notes(builder, handles)
    try:
        result = plain(*args, **kwargs)
    finally:
        semantic.builder = builder
    try:
        made = notes.made(result)
    except Unknown:
        return result, None
    return result, None if notes.looked else again(builder, len(handles), notes.steps, made)


class Notes:
    """A builder that notes what is asked of the interpreter's during one operation."""

    def __init__(self, builder, handles):
        self.builder = builder
        self.places = {id(handle): place for place, handle in enumerate(handles)}
        self.count = len(handles)
        self.constants, self.steps, self.alive = set(), [], []
        self.looked = False

    def __getattr__(self, name):
        found = getattr(self.builder, name)

        def ask(*args):
            result = found(*args)
            self.note(name, args, result)
            return result

        return ask if callable(found) else found

    def note(self, name, args, result):
        self.alive += (args, result)  # so that no id is given twice
        many = isinstance(result, tuple)
        results = [part if isinstance(part, Handle) else None for part in (result if many else (result,))]
        places = [self.place(arg) for arg in args]
        if all(place is None for place, _ in places) and not any(word in name for word in IMPURE):
            self.constants.update(id(part) for part in results if part is not None)
            return
        self.steps.append((name, places, many))
        for part in results:
            if part is not None:
                self.places[id(part)] = self.count
            self.count += 1

    def place(self, argument):
        """(place of a handle among all, None), or (None, what it is each time)."""
        if id(argument) in self.places:
            return self.places[id(argument)], None
        if isinstance(argument, Handle) and id(argument) not in self.constants:
            self.looked = True  # made of the elements of another
        return None, argument

    def look(self, tensor):
        self.looked |= tensor.handle.data.size == 1 and id(tensor.handle) not in self.constants

    def made(self, result):
        """(place, handle, type) of a tensor, or a list of such, or None."""
        if isinstance(result, tuple):
            return [self.made(part) for part in result]
        if result is None:
            return None
        if type(result) is core.tensor:
            return *self.place(result.handle), result.type
        raise Unknown


def again(builder, count, steps, made):
    """These steps, as a function of the `count` handles that they begin with."""

    def tensor(made, handles):
        if made is None:
            return None
        if isinstance(made, list):
            return tuple(tensor(part, handles) for part in made)
        place, handle, type_ = made
        return core.tensor(handle if place is None else handles[place], type_)

    def run(handles):
        for name, places, many in steps:
            args = [constant if place is None else handles[place] for place, constant in places]
            result = getattr(builder, name)(*args)
            handles.extend(result) if many else handles.append(result)
        return tensor(made, handles)

    def run_one(handles):
        args = [constant if place is None else handles[place] for place, constant in places]
        return core.tensor(getattr(builder, name)(*args), type_)

    if len(steps) == 1 and isinstance(made, tuple) and made[0] == count:  # most are a step and its result
        ((name, places, _),), type_ = steps, made[2]
        return run_one
    return run
