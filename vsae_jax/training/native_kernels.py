"""The sparse half of a TopK step, and Adam, as machine code by numba, called by XLA.

    rows     w [d, m] -> [m, d], so that a latent's decoder row is contiguous
    select   z + bias + std eps -> each row's k largest, by index; then a relu, if any
    lists    the rows that selected each latent, in order
    decode   g = 2 / batch (x_hat - x), and the gradient of each selected latent
    sums     for each latent the weighted sum of rows of x or g
    slopes   for each column of two arrays g and w the sums of g^2, g w and w^2
    adam     an array, its gradient and its two moments -> all but the gradient, anew

No two threads add to the same number, and each sum has a fixed order, so the bits do
not depend on the number of threads. `call` is a C function of XLA's FFI, which finds
addresses and shapes in the frame of its call and shares the work with XLA's own
threads; the places of fields below are those of xla/ffi/api/c_api.h. bfloat16 is uint16
here, since numba has none. Everything is in one file, because numba reuses what it has
compiled while the file of a function is unchanged, even if other files have changed.
"""

# numba's functions are not called with the arguments that they are written with.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportPrivateImportUsage=false

import numpy as np
from llvmlite import binding, ir
from numba import carray, cfunc, njit, types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.extending import intrinsic, register_model

# Rows or latents that a thread takes at once, and numbers compared at once.
_ROWS, _LATENTS, _LANES = 32, 64, 64
# Columns that are added up at once: their sums stay in the first cache.
_COLUMNS = 512
# Numbers in a vector: half the registers of a processor hold a wide one.
_WIDE = 128 if binding.get_host_cpu_features().get("avx512f") else 64
_NARROW = 16
# How many rows ahead of its use a row is prefetched.
_AHEAD = 8
# Rows are added up by tiles of columns of this size, which stay in cache.
_TILE_BYTES = 2**20

_I64, _I32, _F32, _U16 = np.int64, np.int32, np.float32, np.uint16
_WORD, _HALFWORD, _FLOAT = ir.IntType(64), ir.IntType(32), ir.FloatType()

# Only other machine code calls these.
_compiled = njit(no_cpython_wrapper=True, no_cfunc_wrapper=True)


# Memory by address, and instructions that LLVM has and numba lacks.


@intrinsic
def _at(typingctx, address):
    """The memory at an address."""

    def code(context, builder, signature, args):
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), code


@intrinsic
def _add(typingctx, address, number):
    """Adds atomically to the word at an address; returns its old value."""

    def code(context, builder, signature, args):
        word = builder.inttoptr(args[0], _WORD.as_pointer())
        return builder.atomic_rmw("add", word, args[1], "seq_cst")

    return types.int64(types.int64, types.int64), code


@intrinsic
def _call(typingctx, function, argument):
    """Calls the C function at an address with one address."""

    def code(context, builder, signature, args):
        kind = ir.FunctionType(_WORD, [_WORD]).as_pointer()
        return builder.call(builder.inttoptr(args[0], kind), [args[1]])

    return types.int64(types.int64, types.int64), code


@intrinsic
def _helper(typingctx):
    """The address of `help`, found by name: compiled code on disk cannot hold it."""

    def code(context, builder, signature, args):
        kind = ir.FunctionType(ir.VoidType(), [_WORD])
        function = cgutils.get_or_insert_function(builder.module, kind, _HELP)
        return builder.ptrtoint(function, _WORD)

    return types.int64(), code


@intrinsic
def _reaching(typingctx, address, least):
    """One bit for each of the 64 floats at an address: whether it is not less than
    `least`, as a NaN is."""

    def code(context, builder, signature, args):
        many = ir.VectorType(_FLOAT, _LANES)
        floats = builder.load(builder.inttoptr(args[0], many.as_pointer()), align=4)
        least = _all(builder, args[1], _LANES)
        return builder.bitcast(builder.fcmp_unordered(">=", floats, least), _WORD)

    return types.int64(types.int64, types.float32), code


@intrinsic
def _lowest(typingctx, bits):
    """The place of the lowest bit that is set."""

    def code(context, builder, signature, args):
        return builder.cttz(args[0], ir.IntType(1)(1))

    return types.int64(types.int64), code


@intrinsic
def _as_float(typingctx, bits):
    """The float of these bits."""

    def code(context, builder, signature, args):
        return builder.bitcast(args[0], _FLOAT)

    return types.float32(types.int32), code


@intrinsic
def _as_bits(typingctx, number):
    """The bits of this float."""

    def code(context, builder, signature, args):
        return builder.bitcast(args[0], _HALFWORD)

    return types.int32(types.float32), code


@intrinsic
def _fetch(typingctx, address):
    """Prefetches 256 bytes at an address."""

    def code(context, builder, signature, args):
        kind = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t] + [_HALFWORD] * 3)
        name = "llvm.prefetch.p0"
        fetch = cgutils.get_or_insert_function(builder.module, kind, name)
        for line in range(0, 256, 64):
            place = builder.inttoptr(
                builder.add(args[0], _WORD(line)), cgutils.voidptr_t
            )
            builder.call(fetch, [place, _HALFWORD(0), _HALFWORD(3), _HALFWORD(1)])
        return context.get_dummy_value()

    return types.void(types.int64), code


# Vectors of floats, as LLVM has them: loops over arrays would use half a register.


class _Vector(types.Type):
    def __init__(self, width):
        self.width = width
        super().__init__(name=f"Vector({width})")


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, ir.VectorType(_FLOAT, kind.width))


def _part(builder, vector, places):
    mask = ir.Constant(ir.VectorType(_HALFWORD, len(places)), list(places))
    return builder.shuffle_vector(vector, vector, mask)


def _all(builder, number, width):
    none = ir.Constant(ir.VectorType(number.type, width), ir.Undefined)
    first = builder.insert_element(none, number, _HALFWORD(0))
    return _part(builder, first, [0] * width)


# By the highest power first: log(1 + x) / x^3 as in cephes, and erfinv(u) / u of
# M. Giles, which XLA has, too: by w = -log(1 - u^2), less 2.5, and by its root, less 3.
_LOG = """7.0376836292e-2 -1.1514610310e-1 1.1676998740e-1 -1.2420140846e-1
    1.4249322787e-1 -1.6668057665e-1 2.0000714765e-1 -2.4999993993e-1 3.3333331174e-1"""
_ERFINV = """2.81022636e-8 3.43273939e-7 -3.5233877e-6 -4.39150654e-6 2.1858087e-4
    -1.25372503e-3 -4.17768164e-3 2.46640727e-1 1.50140941"""
_ERFINV_OF_TAILS = """-2.00214257e-4 1.00950558e-4 1.34934322e-3 -3.67342844e-3
    5.73950773e-3 -7.6224613e-3 9.43887047e-3 1.00167406 2.83297682"""


@intrinsic
def _normals(typingctx, row, columns, like):
    """A vector as long as `like` of the numbers of autoencoder/noise.py, for a row's
    word and the words of columns at an address."""

    def code(context, builder, signature, args):
        floats, words = (ir.VectorType(t, like.width) for t in (_FLOAT, _HALFWORD))

        def number(value):
            return ir.Constant(floats, [float(np.float32(value))] * like.width)

        def word(value):
            return ir.Constant(words, [value] * like.width)

        def function(name, *values):
            kind = ir.FunctionType(floats, [floats] * len(values))
            name = f"llvm.{name}.v{like.width}f32"
            return builder.call(
                cgutils.get_or_insert_function(builder.module, kind, name), values
            )

        def polynomial(x, factors):
            first, *others = map(number, factors.split())
            for factor in others:
                first = function("fma", first, x, factor)
            return first

        def shifted(x, by):
            return builder.xor(x, builder.lshr(x, word(by)))

        pointer = builder.inttoptr(args[1], words.as_pointer())
        x = builder.load(pointer, align=4)
        x = builder.xor(x, _all(builder, args[0], like.width))
        for by, factor in ((16, 0x21F0AAAD), (15, 0xD35A2D97)):
            x = builder.mul(shifted(x, by), word(factor))
        x = builder.or_(builder.lshr(shifted(x, 15), word(9)), word(0x3F800000))
        u = builder.fsub(builder.bitcast(x, floats), number(1.5))
        u = builder.fadd(builder.fmul(u, number(2)), number(2**-23))
        # 1 - u^2 is (1 + part) 2^exponent, with 1 + part from sqrt(1/2) to sqrt(2).
        rest = builder.fsub(number(1), builder.fmul(u, u))
        bits = builder.bitcast(rest, words)
        exponent = builder.sub(bits, word(0x3F3504F3))
        exponent = builder.and_(exponent, word(0xFF800000))
        part = builder.bitcast(builder.sub(bits, exponent), floats)
        part = builder.fsub(part, number(1))
        exponent = builder.sitofp(builder.ashr(exponent, word(23)), floats)
        log = function("fma", polynomial(part, _LOG), part, number(-0.5))
        log = function("fma", log, builder.fmul(part, part), part)
        log = function("fma", exponent, number(-np.log(2)), builder.fneg(log))
        near = polynomial(builder.fsub(log, number(2.5)), _ERFINV)
        root = builder.fsub(function("sqrt", log), number(3))
        far = polynomial(root, _ERFINV_OF_TAILS)
        is_near = builder.fcmp_ordered("<", log, number(5))
        erfinv = builder.fmul(u, builder.select(is_near, near, far))
        return builder.fmul(number(np.sqrt(2)), erfinv)

    return like(types.int32, types.int64, like), code


@intrinsic(prefer_literal=True)
def _zeros(typingctx, width):
    vector = _Vector(width.literal_value)

    def code(context, builder, signature, args):
        kind = ir.VectorType(_FLOAT, vector.width)
        return ir.Constant(kind, [0.0] * vector.width)

    return vector(width), code


@intrinsic
def _load(typingctx, address, zero, like):
    """A vector as long as `like` from numbers of the type of `zero`: float32, or uint16
    for bfloat16."""

    def code(context, builder, signature, args):
        half = zero == types.uint16
        kind = ir.VectorType(ir.IntType(16) if half else _FLOAT, like.width)
        pointer = builder.inttoptr(args[0], kind.as_pointer())
        numbers = builder.load(pointer, align=2 if half else 4)
        if half:
            wide = builder.zext(numbers, ir.VectorType(_HALFWORD, like.width))
            shift = _all(builder, _HALFWORD(16), like.width)
            floats = ir.VectorType(_FLOAT, like.width)
            numbers = builder.bitcast(builder.shl(wide, shift), floats)
        return numbers

    return like(types.int64, zero, like), code


@intrinsic
def _store(typingctx, address, vector):
    def code(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], args[1].type.as_pointer())
        builder.store(args[1], pointer, align=4)
        return context.get_dummy_value()

    return types.void(types.int64, vector), code


@intrinsic
def _plus(typingctx, sums, number, vector):
    """sums + number * vector; number may be a vector, too."""

    def code(context, builder, signature, args):
        sums, number, vector = args
        if number.type == _FLOAT:
            number = _all(builder, number, sums.type.count)
        kind = ir.FunctionType(sums.type, [sums.type] * 3)
        name = f"llvm.fma.v{sums.type.count}f32"
        fma = cgutils.get_or_insert_function(builder.module, kind, name)
        return builder.call(fma, [number, vector, sums])

    return sums(sums, number, vector), code


@intrinsic
def _over_root(typingctx, above, below, least):
    """above / (sqrt(below) + least)."""

    def code(context, builder, signature, args):
        above, below, least = args
        kind = ir.FunctionType(below.type, [below.type])
        name = f"llvm.sqrt.v{below.type.count}f32"
        sqrt = cgutils.get_or_insert_function(builder.module, kind, name)
        least = _all(builder, least, below.type.count)
        root = builder.fadd(builder.call(sqrt, [below]), least)
        return builder.fdiv(above, root)

    return above(above, below, least), code


@intrinsic
def _total(typingctx, vector):
    """The sum of its numbers."""

    def code(context, builder, signature, args):
        (sums,) = args
        while (width := sums.type.count) > 1:
            low, high = range(width // 2), range(width // 2, width)
            sums = builder.fadd(_part(builder, sums, low), _part(builder, sums, high))
        return builder.extract_element(sums, _HALFWORD(0))

    return types.float32(vector), code


@intrinsic
def _turn(typingctx, source, source_step, target, target_step, zero):
    """Writes 16 rows of 16 floats as 16 columns, rounded to the type of `zero`. Steps
    are the bytes from row to row."""

    def code(context, builder, signature, args):
        source, source_step, target, target_step, _ = args
        n, half = _NARROW, zero == types.uint16
        kind, bits = ir.VectorType(_FLOAT, n), ir.VectorType(_HALFWORD, n)
        rows = []
        for _ in range(n):
            pointer = builder.inttoptr(source, kind.as_pointer())
            rows.append(builder.load(pointer, align=4))
            source = builder.add(source, source_step)
        step = 1
        while step < n:  # swaps blocks of step x step across the diagonal
            low = [j if not j & step else n + j - step for j in range(n)]
            high = [j + step if not j & step else n + j for j in range(n)]
            for i in (i for i in range(n) if not i & step):
                a, b = rows[i], rows[i + step]
                rows[i], rows[i + step] = (
                    builder.shuffle_vector(a, b, ir.Constant(bits, mask))
                    for mask in (low, high)
                )
            step *= 2
        for row in rows:
            if half:  # rounds to nearest, ties to even
                row = builder.bitcast(row, bits)
                sixteen = _all(builder, _HALFWORD(16), n)
                odd = builder.and_(
                    builder.lshr(row, sixteen), _all(builder, _HALFWORD(1), n)
                )
                up = builder.add(odd, _all(builder, _HALFWORD(0x7FFF), n))
                row = builder.lshr(builder.add(row, up), sixteen)
                row = builder.trunc(row, ir.VectorType(ir.IntType(16), n))
            pointer = builder.inttoptr(target, row.type.as_pointer())
            builder.store(row, pointer, align=2)
            target = builder.add(target, target_step)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4, zero), code


_HELP = "vsae_jax_native_help"
_malloc = types.ExternalFunction("malloc", types.int64(types.int64))
_free = types.ExternalFunction("free", types.void(types.int64))


@_compiled
def _words(address, count):
    return carray(_at(address), count, _I64)


# The frame of a call, in words: 1 its extensions, 2 the API, 3 the context, 9 the
# arguments, 14 the results, 20 the attributes, of which there is one.
_ARGUMENT, _RESULT, _ATTRIBUTE = 9, 14, 20
_VERSION = 3 << 32  # 0.3, the minor half above
_BFLOAT16 = 16


@_compiled
def _buffer(frame, side, place):
    """An argument or a result, in words: 2 its type, 3 its address, 5 its shape."""
    return _words(_words(_words(frame, 21)[side], place + 1)[place], 6)


@_compiled
def _address(frame, side, place):
    return _buffer(frame, side, place)[3]


@_compiled
def _data(frame, side, place):
    return _at(_buffer(frame, side, place)[3])


@_compiled
def _shape(frame, side, place):
    """The two sizes of a matrix."""
    sizes = _words(_buffer(frame, side, place)[5], 2)
    return sizes[0], sizes[1]


@_compiled
def _size(frame, side, place):
    """The bytes of a number: 2 for bfloat16, 4 for the others."""
    return 2 if (_buffer(frame, side, place)[2] & 0xFF) == _BFLOAT16 else 4


@_compiled
def _share(frame, kernel, chunks):
    """Works through all chunks, together with those of XLA's threads that come in time.
    `help` is called by its address, so that the kernels are compiled once.

    What threads share, in words: 0 the next chunk, 1 the number of chunks, 2 of those
    done, 3 of threads that may still look, 4 the frame, 5 the kernel; 6 the answer and
    7 to 11 the arguments of calls to XLA.
    """
    shared = _malloc(8 * 12)
    words = _words(shared, 12)
    api, context = _words(_words(frame, 21)[2], 19), _words(frame, 21)[3]
    words[6], words[7], words[8], words[9], words[10] = 1, 32, 0, context, shared + 48
    _call(api[18], shared + 56)
    helpers = min(words[6], chunks) - 1
    words[0], words[1], words[2] = 0, chunks, 0
    words[3], words[4], words[5] = helpers + 2, frame, kernel
    words[7], words[10], words[11] = 40, _helper(), shared
    for _ in range(helpers):
        _call(api[17], shared + 56)
    _call(_helper(), shared)
    while _add(shared + 16, 0) < chunks:
        pass
    _leave(shared)


@_compiled
def _leave(shared):
    if _add(shared + 24, -1) == 1:
        _free(shared)


@_compiled
def _take(shared):
    """Does chunks until none is left. A thread that comes late finds none, and does not
    touch the frame, which is gone by then."""
    words = _words(shared, 6)
    while True:
        chunk = _add(shared, 1)
        if chunk >= words[1]:
            return
        frame, kernel = words[4], words[5]
        if kernel == 0:
            _rows(frame, chunk)
        elif kernel == 1:
            _select(frame, chunk)
        elif kernel == 3:
            _decode(frame, chunk)
        elif kernel == 4:
            _sums(frame, chunk)
        elif kernel == 5:
            _slopes(frame, chunk)
        else:
            _adam(frame, chunk)
        _add(shared + 16, 1)


# rows


@_compiled
def _rows(frame, chunk):
    d, m = _shape(frame, _ARGUMENT, 0)
    w, out = _address(frame, _ARGUMENT, 0), _address(frame, _RESULT, 0)
    for i in range(chunk * _LATENTS, min((chunk + 1) * _LATENTS, m), _NARROW):
        for c in range(0, d, _NARROW):
            source = w + 4 * (c * m + i)
            if _size(frame, _RESULT, 0) == 2:
                _turn(source, 4 * m, out + 2 * (i * d + c), 2 * d, _U16(0))
            else:
                _turn(source, 4 * m, out + 4 * (i * d + c), 4 * d, _F32(0))


# select: keys are integers in the order of their floats; -0 is 0, NaN above all


@_compiled
def _key(bits):
    size = bits & 0x7FFFFFFF
    key = -size if bits < 0 else size
    return _I32(0x7FFFFFFF if size > 0x7F800000 else key)


@_compiled
def _float_of(key):
    return _as_float(_I32(key if key >= 0 else -key | -(2**31)))


@_compiled
def _reach(keys, n, least):
    """How many of the first n keys are at least `least`."""
    count = _I32(0)
    for i in range(n):
        count = _I32(count + (keys[i] >= least))
    return _I64(count)


@_compiled
def _highest(keys, n):
    highest = keys[0]
    for i in range(n):
        highest = max(highest, keys[i])
    return highest


@_compiled
def _floor(z, keys, k):
    """A key that at least k keys reach, and few more unless they are equal."""
    n = len(z)
    for i in range(n):
        keys[i] = _key(_as_bits(z[i]))
    low, count, high = _I64(-0x7F800000), n, _I64(2**31)  # from -infinity
    middle = _I64(1)  # after a relu many are 0
    while high - low > 1 and count > 3 * k:
        reached = _reach(keys, n, _I32(middle))
        if reached >= k + k // 2 or k <= reached <= 3 * k:
            low, count = middle, reached
        else:
            high = middle
        middle = _I64(0) if high == 1 and low < 0 else (low + high) // 2
    return _I32(low)


@_compiled
def _candidates(z, floor, kept, places):
    """Writes the keys that reach the floor and their places; returns their number."""
    n, found, least, address = len(z), 0, _float_of(floor), z.ctypes.data
    whole = n - n % _LANES
    for start in range(0, whole, _LANES):
        bits = _reaching(address + 4 * start, least)
        while bits != 0:
            i = start + _lowest(bits)
            places[found], kept[found] = i, _key(_as_bits(z[i]))
            found += 1
            bits &= bits - 1
    for i in range(whole, n):
        key = _key(_as_bits(z[i]))
        if key >= floor:
            places[found], kept[found] = i, key
            found += 1
    return found


@_compiled
def _select(frame, chunk):
    n, m = _shape(frame, _ARGUMENT, 0)
    k_max = _shape(frame, _RESULT, 0)[1]
    given = carray(_data(frame, _ARGUMENT, 0), (n, m), _F32)
    bias = carray(_data(frame, _ARGUMENT, 1), m, _F32)
    std = carray(_data(frame, _ARGUMENT, 5), 1, _F32)[0]
    words = carray(_data(frame, _ARGUMENT, 3), n, _I32)
    columns = _address(frame, _ARGUMENT, 4)
    k = min(_I64(carray(_data(frame, _ARGUMENT, 2), 1, _I32)[0]), k_max)
    relu = carray(_data(frame, _ARGUMENT, 2), 2, _I32)[1] != 0
    index = carray(_data(frame, _RESULT, 0), (n, k_max), _I32)
    value = carray(_data(frame, _RESULT, 1), (n, k_max), _F32)
    keys, places = np.empty(m, _I32), np.empty(m, _I32)
    kept, z, floor = np.empty(m + _LANES, _I32), np.empty(m, _F32), _I32(0)
    for r in range(chunk * _ROWS, min((chunk + 1) * _ROWS, n)):
        for i in range(m):
            z[i] = given[r, i] + bias[i]
        if std != 0:
            for i in range(0, m, _NARROW):
                at, eps = z.ctypes.data + 4 * i, _zeros(_NARROW)
                eps = _normals(words[r], columns + 4 * i, eps)
                _store(at, _plus(_load(at, _F32(0), eps), std, eps))
        # The floor of the row before is mostly good enough.
        left = _candidates(z, floor, kept, places)
        if left < k or left > 4 * k:
            floor = _floor(z, keys, k)
            left = _candidates(z, floor, kept, places)
        # Filled up, so that counts take whole vectors only.
        full = -(-left // _LANES) * _LANES
        kept[left:full] = -(2**31)
        low, count, high = _I64(floor), left, _I64(_highest(kept, full)) + 1
        while count != k and high - low > 1:
            middle = (low + high) // 2
            reached = _reach(kept, full, _I32(middle))
            if reached >= k:
                low, count = middle, reached
            else:
                high = middle
        ties = k
        if count != k:
            ties = k - _reach(kept, full, _I32(low + 1)) if low < 2**31 - 1 else k
        found = 0
        for i in range(left):
            if kept[i] > low or (kept[i] == low and ties > 0):
                ties -= kept[i] == low
                index[r, found] = places[i]
                value[r, found] = 0 if relu and kept[i] < 0 else _float_of(kept[i])
                found += 1
        for j in range(found, k_max):
            index[r, j], value[r, j] = 0, 0


# lists


@_compiled
def _lists(frame):
    """Writes where each latent's list starts, the lists (the row and the place among
    values of each selection, in order), and whether a value was above 0."""
    n, k_max = _shape(frame, _ARGUMENT, 0)
    index = carray(_data(frame, _ARGUMENT, 0), (n, k_max), _I32)
    value = carray(_data(frame, _ARGUMENT, 1), (n, k_max), _F32)
    k = min(_I64(carray(_data(frame, _ARGUMENT, 2), 1, _I32)[0]), k_max)
    m = _shape(frame, _RESULT, 0)[0] - 1
    start = carray(_data(frame, _RESULT, 0), m + 1, _I32)
    pairs = carray(_data(frame, _RESULT, 1), (n * k_max, 2), _I32)
    fired = carray(_data(frame, _RESULT, 2), m, np.uint8)
    start[:] = 0
    fired[:] = 0
    for r in range(n):
        for j in range(k):
            start[index[r, j] + 1] += 1
    for i in range(m):
        start[i + 1] += start[i]
    following = start[:m].copy()
    for r in range(n):
        for j in range(k):
            i = index[r, j]
            place = following[i]
            pairs[place, 0], pairs[place, 1] = r, r * k_max + j
            following[i] = place + 1
            fired[i] |= value[r, j] > 0


# decode


@_compiled
def _decode(frame, chunk):
    if _size(frame, _ARGUMENT, 1) == 2:
        _decode_by(frame, chunk, _U16(0))
    else:
        _decode_by(frame, chunk, _F32(0))


@_compiled
def _decode_by(frame, chunk, zero):
    (n, d), size = _shape(frame, _ARGUMENT, 0), _size(frame, _ARGUMENT, 1)
    k_max = _shape(frame, _ARGUMENT, 3)[1]
    x, w = _address(frame, _ARGUMENT, 0), _address(frame, _ARGUMENT, 1)
    b, g = _address(frame, _ARGUMENT, 2), _address(frame, _RESULT, 0)
    index = carray(_data(frame, _ARGUMENT, 3), (n, k_max), _I32)
    value = carray(_data(frame, _ARGUMENT, 4), (n, k_max), _F32)
    numbers = carray(_data(frame, _ARGUMENT, 5), 2, _I32)
    k, relu = min(_I64(numbers[0]), k_max), numbers[1] != 0
    dz = carray(_data(frame, _RESULT, 1), (n, k_max), _F32)
    whole = d - d % _WIDE
    for r in range(chunk * _ROWS, min((chunk + 1) * _ROWS, n)):
        at, these, scale = 4 * r * d, index[r], _F32(2.0 / n)
        for c in range(0, whole, _WIDE):
            s = _error(x + at + 4 * c, b + 4 * c, _zeros(_WIDE))
            for j in range(k):
                _fetch(w + size * (_I64(these[min(j + _AHEAD, k - 1)]) * d + c))
                row = w + size * (_I64(these[j]) * d + c)
                s = _plus(s, value[r, j], _load(row, zero, s))
            _store(g + at + 4 * c, _plus(_zeros(_WIDE), scale, s))
        for c in range(whole, d, _NARROW):
            t = _error(x + at + 4 * c, b + 4 * c, _zeros(_NARROW))
            for j in range(k):
                row = w + size * (_I64(these[j]) * d + c)
                t = _plus(t, value[r, j], _load(row, zero, t))
            _store(g + at + 4 * c, _plus(_zeros(_NARROW), scale, t))
        for j in range(k_max):
            if j >= k or (relu and not value[r, j] > 0):
                dz[r, j] = 0
                continue
            row, s, t = w + size * _I64(these[j]) * d, _zeros(_WIDE), _zeros(_NARROW)
            for c in range(0, whole, _WIDE):
                other = _load(g + at + 4 * c, _F32(0), s)
                s = _plus(s, other, _load(row + size * c, zero, s))
            for c in range(whole, d, _NARROW):
                other = _load(g + at + 4 * c, _F32(0), t)
                t = _plus(t, other, _load(row + size * c, zero, t))
            dz[r, j] = _total(s) + _total(t)


@_compiled
def _error(x, b, like):
    """b_dec - x, to which the selected decoder rows are added."""
    return _plus(_load(b, _F32(0), like), _F32(-1), _load(x, _F32(0), like))


# sums


@_compiled
def _tiles(frame):
    """The number of tiles of columns that rows are cut into, and the width of one."""
    n, d = _shape(frame, _ARGUMENT, 2)
    bytes_of_one = n * _size(frame, _ARGUMENT, 2)
    width = min(max(_TILE_BYTES // bytes_of_one // _WIDE, 1) * _WIDE, d)
    return -(-d // width), width


@_compiled
def _sums(frame, chunk):
    if _size(frame, _ARGUMENT, 2) == 2:
        _sums_of(frame, chunk, _U16(0))
    else:
        _sums_of(frame, chunk, _F32(0))


@_compiled
def _sums_of(frame, chunk, zero):
    d, size = _shape(frame, _ARGUMENT, 2)[1], _size(frame, _ARGUMENT, 2)
    m, slots = _shape(frame, _RESULT, 0)[1], _shape(frame, _ARGUMENT, 1)[0]
    start = carray(_data(frame, _ARGUMENT, 0), m + 1, _I32)
    pairs = carray(_data(frame, _ARGUMENT, 1), (slots, 2), _I32)
    rows, out = _address(frame, _ARGUMENT, 2), _address(frame, _RESULT, 0)
    weight = carray(_data(frame, _ARGUMENT, 3), slots, _F32)
    total = carray(_data(frame, _RESULT, 1), m, _F32)
    blocks, (_, width) = -(-m // _LATENTS), _tiles(frame)
    left = chunk // blocks * width
    right, block = min(left + width, d), chunk % blocks * _LATENTS
    whole = right - (right - left) % _WIDE
    sums = np.empty((_NARROW, width), _F32)
    for first in range(block, min(block + _LATENTS, m), _NARROW):
        for i in range(first, first + _NARROW):
            begin, end = _I64(start[i]), _I64(start[i + 1])
            place = sums.ctypes.data + 4 * (i - first) * width
            for c in range(left, whole, _WIDE):
                s = _zeros(_WIDE)
                for p in range(begin, end):
                    ahead = _I64(pairs[min(p + _AHEAD, slots - 1), 0])
                    _fetch(rows + size * (ahead * d + c))
                    row = rows + size * (_I64(pairs[p, 0]) * d + c)
                    s = _plus(s, weight[pairs[p, 1]], _load(row, zero, s))
                _store(place + 4 * (c - left), s)
            for c in range(whole, right, _NARROW):
                t = _zeros(_NARROW)
                for p in range(begin, end):
                    row = rows + size * (_I64(pairs[p, 0]) * d + c)
                    t = _plus(t, weight[pairs[p, 1]], _load(row, zero, t))
                _store(place + 4 * (c - left), t)
            if left == 0:
                weights = _F32(0)
                for p in range(begin, end):
                    weights += weight[pairs[p, 1]]
                total[i] = weights
        for c in range(left, right, _NARROW):
            source = sums.ctypes.data + 4 * (c - left)
            _turn(source, 4 * width, out + 4 * (c * m + first), 4 * m, _F32(0))
    sums[0, 0] = 0  # keeps `sums` alive until here


# slopes


@_compiled
def _slopes(frame, chunk):
    d, m = _shape(frame, _ARGUMENT, 0)
    g, w = _address(frame, _ARGUMENT, 0), _address(frame, _ARGUMENT, 1)
    left = chunk * _COLUMNS
    sums, right = _address(frame, _RESULT, 0), min(left + _COLUMNS, m)
    carray(_data(frame, _RESULT, 0), (3, m), _F32)[:, left:right] = 0
    for r in range(d):
        for c in range(left, right, _NARROW):
            at, of_g, of_w = 4 * (r * m + c), _zeros(_NARROW), _zeros(_NARROW)
            of_g, of_w = _load(g + at, _F32(0), of_g), _load(w + at, _F32(0), of_w)
            _added(sums + 4 * c, of_g, of_g)
            _added(sums + 4 * (m + c), of_g, of_w)
            _added(sums + 4 * (2 * m + c), of_w, of_w)


@_compiled
def _added(address, one, other):
    _store(address, _plus(_load(address, _F32(0), one), one, other))


# adam


@_compiled
def _adam(frame, chunk):
    """The results may lie where the arguments 0, 2 and 3 lie."""
    d, m = _shape(frame, _ARGUMENT, 0)
    w, g = _address(frame, _ARGUMENT, 0), _address(frame, _ARGUMENT, 1)
    mu, nu = _address(frame, _ARGUMENT, 2), _address(frame, _ARGUMENT, 3)
    slope, n = _address(frame, _ARGUMENT, 4), _data(frame, _ARGUMENT, 5)
    new_w, new_mu = _address(frame, _RESULT, 0), _address(frame, _RESULT, 1)
    new_nu, none, f = _address(frame, _RESULT, 2), _zeros(_NARROW), _F32(0)
    numbers = carray(n, 6, _F32)
    factor, rate, of_nu = numbers[0], numbers[1], numbers[2]
    b1, b2, eps = numbers[3], numbers[4], numbers[5]
    for at in range(4 * chunk * _NARROW * m, 4 * (chunk + 1) * _NARROW * m, 64):
        old, column = _load(w + at, f, none), at % (4 * m)
        x = _plus(_load(g + at, f, none), _load(slope + column, f, none), old)
        x = _plus(none, factor, x)
        first = _plus(none, b1, _load(mu + at, f, none))
        first = _plus(first, _F32(1) - b1, x)
        second = _plus(none, b2, _load(nu + at, f, none))
        second = _plus(second, x, _plus(none, _F32(1) - b2, x))
        _store(new_mu + at, first)
        _store(new_nu + at, second)
        change = _over_root(first, _plus(none, of_nu, second), eps)
        _store(new_w + at, _plus(old, -rate, change))


# What XLA calls, and what its threads do.


@cfunc(types.void(types.int64), cache=True)
def help(shared):
    """A helper's part of a call."""
    _take(shared)
    _leave(shared)


binding.add_symbol(_HELP, help.address)


@cfunc(types.int64(types.int64), cache=True)
def call(frame):
    """Runs one of the kernels, by the attribute: 0 rows, 1 select, 2 lists, 3 decode,
    4 sums, 5 slopes, 6 adam. XLA first asks for the version of its API that this was
    written for."""
    words = _words(frame, 21)
    if words[1] != 0:
        _words(_words(words[1], 4)[3], 6)[3] = _VERSION
        return 0
    scalar = _words(_words(_words(frame, 21)[_ATTRIBUTE], 1)[0], 2)[1]
    kernel = _I64(carray(_at(scalar), 1, _I32)[0])
    if kernel == 0:
        _share(frame, kernel, -(-_shape(frame, _ARGUMENT, 0)[1] // _LATENTS))
    elif kernel == 1 or kernel == 3:
        _share(frame, kernel, -(-_shape(frame, _ARGUMENT, 0)[0] // _ROWS))
    elif kernel == 2:
        _lists(frame)
    elif kernel == 5:
        _share(frame, kernel, -(-_shape(frame, _ARGUMENT, 0)[1] // _COLUMNS))
    elif kernel == 6:
        _share(frame, kernel, -(-_shape(frame, _ARGUMENT, 0)[0] // _NARROW))
    else:
        blocks = -(-_shape(frame, _RESULT, 0)[1] // _LATENTS)
        _share(frame, kernel, blocks * _tiles(frame)[0])
    return 0
