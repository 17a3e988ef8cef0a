// A struct of a kernel's arguments from the Python tuple of its fields, in their order (pycompress/ops/_arguments.py).
//
// Tensors are given as they are and become addresses here, so that the tuple keeps them alive while a kernel runs.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <limits>
#include <string>
#include <type_traits>
#include <utility>

namespace pycompress {

namespace py = pybind11;

// Where a tensor's data starts, null for None. Throws std::invalid_argument for one whose memory was given back.
inline void *address_of(py::handle given) {
  if (given.is_none()) return nullptr;
  static PyObject *const data_ptr = PyUnicode_InternFromString("data_ptr");
  PyObject *found =
      PyLong_Check(given.ptr()) ? given.inc_ref().ptr() : PyObject_CallMethodNoArgs(given.ptr(), data_ptr);
  if (!found) throw py::error_already_set();
  void *address = PyLong_AsVoidPtr(found);
  Py_DECREF(found);
  if (!address && PyErr_Occurred()) throw py::error_already_set();
  if (!address && !PyLong_Check(given.ptr()) && py::cast<int64_t>(given.attr("numel")())) {
    throw std::invalid_argument("a tensor of shape " + std::string(py::str(py::list(given.attr("shape")))) +
                                " has no memory: load it before running it");
  }
  return address;
}

// One field, which takes the type that the struct declares it with.
struct Field {
  PyObject *value;

  template <class T>
  operator T() const {
    if constexpr (std::is_pointer_v<T>) {
      return static_cast<T>(address_of(value));
    } else if constexpr (std::is_same_v<T, bool>) {
      return value == Py_True;
    } else if constexpr (std::is_floating_point_v<T>) {
      const double number = PyFloat_AsDouble(value);
      if (number == -1.0 && PyErr_Occurred()) throw py::error_already_set();
      return static_cast<T>(number);
    } else {
      const long long number = PyLong_AsLongLong(value);
      if (number == -1 && PyErr_Occurred()) throw py::error_already_set();
      if constexpr (!std::is_enum_v<T>) {
        if (number < std::numeric_limits<T>::min() || number > std::numeric_limits<T>::max())
          throw std::out_of_range(std::to_string(number) + " is no argument of a kernel");
      }
      return static_cast<T>(number);
    }
  }
};

template <class T, std::size_t... I>
auto made_of(std::index_sequence<I...>) -> decltype(T{(static_cast<void>(I), Field{})...}, std::true_type{});
template <class T>
std::false_type made_of(...);

// Fields of a struct: the most values it can be made of.
template <class T, std::size_t N = 32>
constexpr std::size_t field_count() {
  if constexpr (decltype(made_of<T>(std::make_index_sequence<N>{}))::value) {
    return N;
  } else {
    return field_count<T, N - 1>();
  }
}

template <class T, std::size_t... I>
T from_tuple(py::handle given, std::index_sequence<I...>) {
  return T{Field{PyTuple_GET_ITEM(given.ptr(), I)}...};
}

template <class T>
T from_tuple(py::handle given) {
  constexpr std::size_t count = field_count<T>();
  if (!PyTuple_Check(given.ptr()) || PyTuple_GET_SIZE(given.ptr()) != static_cast<Py_ssize_t>(count))
    throw py::type_error("a kernel takes the tuple of its " + std::to_string(count) + " arguments");
  return from_tuple<T>(given, std::make_index_sequence<count>{});
}

}  // namespace pycompress
