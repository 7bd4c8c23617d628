"""Vector code that numba cannot be talked into: small matrix products and softmax over fp32 rows at raw addresses.

Each function below writes LLVM instructions on vectors of :data:`VECTOR` fp32 lanes, which LLVM maps to what the CPU has
(AVX-512, AVX2, NEON, ...). They know nothing of attention.
"""
# ruff: noqa: ARG001  numba calls a typing function and its code generator with a fixed list of parameters

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

VECTOR = 16
"""fp32 lanes of a vector; narrower hardware runs it as several."""

LOWEST = -1e30
"""What stands for minus infinity: finite, so that the difference of two of them is not NaN."""

_EXP2_COEFFICIENTS = (
    1.0,
    0.6931471824645996,
    0.24022646248340607,
    0.05550329014658928,
    0.009618519805371761,
    0.0013399859890341759,
    0.00015337577497120947,
)
"""2^x on [-0.5, 0.5]: least squares of the relative error at Chebyshev nodes, 1e-7 in fp32."""

_MIN_EXPONENT = -126.0
"""Below it 2^x is not a normal fp32 number and taken as 0."""

_intrinsic: Any = intrinsic
"""Untyped: it turns a function of types into one of values, without the first parameter."""

_INT64, _INT32, _FLOAT32 = ir.IntType(64), ir.IntType(32), ir.FloatType()
_FLOATS, _INTS = ir.VectorType(_FLOAT32, VECTOR), ir.VectorType(_INT32, VECTOR)
_HALVES = ir.VectorType(ir.IntType(16), VECTOR)


def _long(value: int) -> Any:
    return ir.Constant(_INT64, value)


def _all(value: float) -> Any:
    return ir.Constant(_FLOATS, [float(value)] * VECTOR)


def _all_int(value: int) -> Any:
    return ir.Constant(_INTS, [value] * VECTOR)


class _Code:
    """Writes vector instructions at a builder's position; addresses are int64 values."""

    def __init__(self, builder: Any) -> None:
        self.builder = builder

    def load(self, address: Any) -> Any:
        """A vector of fp32."""
        return self.builder.load(self.builder.inttoptr(address, _FLOATS.as_pointer()), align=4)

    def load_half(self, address: Any) -> Any:
        """A vector of bf16, widened: its bits are the upper half of an fp32 number."""
        raw = self.builder.load(self.builder.inttoptr(address, _HALVES.as_pointer()), align=2)
        return self.builder.bitcast(self.builder.shl(self.builder.zext(raw, _INTS), _all_int(16)), _FLOATS)

    def store(self, value: Any, address: Any) -> None:
        """Write a vector of fp32."""
        self.builder.store(value, self.builder.inttoptr(address, _FLOATS.as_pointer()), align=4)

    def load_splat(self, address: Any) -> Any:
        """One fp32 number in every lane."""
        return self.splat(self.builder.load(self.builder.inttoptr(address, _FLOAT32.as_pointer()), align=4))

    def splat(self, value: Any) -> Any:
        """``value`` in every lane."""
        undefined = ir.Constant(_FLOATS, ir.Undefined)
        single = self.builder.insert_element(undefined, value, ir.Constant(_INT32, 0))
        return self.builder.shuffle_vector(single, undefined, _all_int(0))

    def multiply_add(self, a: Any, b: Any, c: Any) -> Any:
        """a * b + c, fused where the CPU can."""
        return self._call("fmuladd", [a, b, c])

    def maximum(self, a: Any, b: Any) -> Any:
        """The larger of each pair of lanes."""
        return self.builder.select(self.builder.fcmp_ordered(">", a, b), a, b)

    def floor(self, value: Any) -> Any:
        """Each lane rounded down."""
        return self._call("floor", [value])

    def largest_lane(self, value: Any) -> Any:
        """Maximum over the lanes."""
        return self._reduce("fmax", [value], [_FLOATS])

    def sum_of_lanes(self, value: Any) -> Any:
        """Sum over the lanes, in any order."""
        return self._reduce("fadd", [ir.Constant(_FLOAT32, -0.0), value], [_FLOAT32, _FLOATS])

    def prefetch(self, address: Any) -> None:
        """Ask for the cache line at ``address`` to be read into the second-level cache."""
        pointer = ir.IntType(8).as_pointer()
        function = cgutils.get_or_insert_function(
            self.builder.module, ir.FunctionType(ir.VoidType(), [pointer, _INT32, _INT32, _INT32]), "llvm.prefetch.p0"
        )
        read, second_level, data = (ir.Constant(_INT32, number) for number in (0, 2, 1))
        self.builder.call(function, [self.builder.inttoptr(address, pointer), read, second_level, data])

    def exp2(self, value: Any) -> Any:
        """2^x of lanes <= 0: a polynomial on the fraction, the whole part added to the exponent bits."""
        builder = self.builder
        bounded = self.maximum(value, _all(_MIN_EXPONENT))
        whole = self.floor(builder.fadd(bounded, _all(0.5)))
        fraction = builder.fsub(bounded, whole)
        power = _all(_EXP2_COEFFICIENTS[-1])
        for coefficient in reversed(_EXP2_COEFFICIENTS[:-1]):
            power = self.multiply_add(power, fraction, _all(coefficient))
        exponent = builder.add(builder.fptosi(whole, _INTS), _all_int(127))
        scale = builder.bitcast(builder.shl(exponent, _all_int(23)), _FLOATS)
        normal = builder.fcmp_ordered(">", value, _all(_MIN_EXPONENT))
        return builder.select(normal, builder.fmul(power, scale), _all(0.0))

    def _call(self, name: str, args: list[Any]) -> Any:
        """An LLVM intrinsic on vectors."""
        function_type = ir.FunctionType(_FLOATS, [_FLOATS] * len(args))
        name = f"llvm.{name}.v{VECTOR}f32"
        return self.builder.call(cgutils.get_or_insert_function(self.builder.module, function_type, name), args)

    def _reduce(self, name: str, args: list[Any], arg_types: list[Any]) -> Any:
        """An LLVM reduction over lanes."""
        name = f"llvm.vector.reduce.{name}.v{VECTOR}f32"
        function = cgutils.get_or_insert_function(self.builder.module, ir.FunctionType(_FLOAT32, arg_types), name)
        return self.builder.call(function, args, fastmath=("reassoc", "nnan"))


@_intrinsic
def fetch_add(typingctx: Any, address: Any) -> Any:
    """Atomically add 1 to the int64 at ``address``; its value before."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", builder.inttoptr(args[0], _INT64.as_pointer()), _long(1), "acq_rel")

    return types.int64(types.int64), codegen


@_intrinsic
def pointer_to(typingctx: Any, address: Any, dtype: Any) -> Any:
    """``address`` as a pointer to elements of ``dtype`` (a numpy scalar class or a numba record type)."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(dtype.instance_type)(types.int64, dtype), codegen


@_intrinsic
def largest_of(typingctx: Any, address: Any, num_vectors: Any) -> Any:
    """Maximum of ``num_vectors`` vectors of fp32 at ``address``; LOWEST if there are none."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        code = _Code(builder)
        largest = cgutils.alloca_once_value(builder, _all(LOWEST))
        with cgutils.for_range(builder, args[1], intp=_INT64) as loop:
            vector = code.load(builder.add(args[0], builder.mul(loop.index, _long(4 * VECTOR))))
            builder.store(code.maximum(vector, builder.load(largest)), largest)
        return code.largest_lane(builder.load(largest))

    return types.float32(types.int64, types.int64), codegen


@_intrinsic
def exp2_in_place(typingctx: Any, address: Any, num_vectors: Any, shift: Any) -> Any:
    """Replace each x of ``num_vectors`` vectors of fp32 at ``address`` by 2^(x - shift), x <= shift; returns their sum."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        code = _Code(builder)
        total = cgutils.alloca_once_value(builder, _all(0.0))
        shift = code.splat(args[2])
        with cgutils.for_range(builder, args[1], intp=_INT64) as loop:
            place = builder.add(args[0], builder.mul(loop.index, _long(4 * VECTOR)))
            weights = code.exp2(builder.fsub(code.load(place), shift))
            code.store(weights, place)
            builder.store(builder.fadd(builder.load(total), weights), total)
        return code.sum_of_lanes(builder.load(total))

    return types.float32(types.int64, types.int64, types.float32), codegen


class _Product:
    """Writes one small matrix product, its sums held in registers; see :func:`product`."""

    def __init__(self, builder: Any, num_rows: int, num_vectors: int, is_half: int, args: Any) -> None:
        self.builder, self.code = builder, _Code(builder)
        self.num_rows, self.num_vectors, self.is_half = num_rows, num_vectors, is_half
        self.accumulate, self.c, self.ldc, self.a, self.lda, self.b, self.ldb, self.depth, self.ahead = args
        # A multiply-add takes about four cycles and two start in each: eight independent sums keep the units busy.
        self.unroll = max(1, 8 // (num_rows * num_vectors))
        self.sums = {
            (part, row, column): cgutils.alloca_once_value(builder, _all(0.0))
            for part in range(self.unroll)
            for row in range(num_rows)
            for column in range(num_vectors)
        }

    def write(self) -> None:
        """All instructions: the loop over ``depth``, what is left of it, the stores to C."""
        builder = self.builder
        whole = builder.sub(self.depth, builder.srem(self.depth, _long(self.unroll)))
        with cgutils.for_range_slice(builder, _long(0), whole, _long(self.unroll), _INT64) as (k, _):
            for part in range(self.unroll):
                self._step(builder.add(k, _long(part)), part)
        if self.unroll > 1:
            with cgutils.for_range_slice(builder, whole, self.depth, _long(1), _INT64) as (k, _):
                self._step(k, 0)
        old_values = builder.icmp_signed("!=", self.accumulate, _long(0))
        for row in range(self.num_rows):
            for column in range(self.num_vectors):
                total = builder.load(self.sums[0, row, column])
                for part in range(1, self.unroll):
                    total = builder.fadd(total, builder.load(self.sums[part, row, column]))
                address = self._element(self.c, _long(row), self.ldc, column * VECTOR, 4)
                old = builder.select(old_values, self.code.load(address), _all(0.0))
                self.code.store(builder.fadd(total, old), address)

    def _step(self, k: Any, part: int) -> None:
        """sums[part] += A[:, k] B[k, :]."""
        size = 2 if self.is_half else 4
        columns = []
        for column in range(self.num_vectors):
            address = self._element(self.b, k, self.ldb, column * VECTOR, size)
            columns.append(self.code.load_half(address) if self.is_half else self.code.load(address))
            if column * VECTOR * size % 64 == 0:  # once for each cache line
                self.code.prefetch(self.builder.add(address, self.ahead))
        for row in range(self.num_rows):
            offset = self.builder.add(self.builder.mul(_long(row), self.lda), k)
            factor = self.code.load_splat(self.builder.add(self.a, self.builder.mul(offset, _long(4))))
            for column in range(self.num_vectors):
                place = self.sums[part, row, column]
                self.builder.store(self.code.multiply_add(factor, columns[column], self.builder.load(place)), place)

    def _element(self, base: Any, row: Any, stride: Any, column: int, size: int) -> Any:
        """Address of an element of a matrix."""
        offset = self.builder.add(self.builder.mul(row, stride), _long(column))
        return self.builder.add(base, self.builder.mul(offset, _long(size)))


@_intrinsic(prefer_literal=True)
def product(
    typingctx: Any,
    rows: Any,
    vectors: Any,
    half: Any,
    accumulate: Any,
    c: Any,
    ldc: Any,
    a: Any,
    lda: Any,
    b: Any,
    ldb: Any,
    depth: Any,
    ahead: Any,
) -> Any:
    """C[:rows, :vectors * VECTOR] = A[:rows, :depth] B[:depth, :vectors * VECTOR], plus the old C if ``accumulate``.

    ``rows``, ``vectors`` and ``half`` must be literals. ``a``, ``b``, ``c`` are addresses; A and C are fp32, B is bf16 if
    ``half`` is 1 and else fp32; ``lda``, ``ldb``, ``ldc`` are row strides in elements. While B is read, what lies ``ahead``
    bytes behind it is fetched into the cache.
    """
    sizes = (rows.literal_value, vectors.literal_value, half.literal_value)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _Product(builder, *sizes, args[3:]).write()
        return context.get_dummy_value()

    return types.void(rows, vectors, half, *([types.int64] * 9)), codegen
