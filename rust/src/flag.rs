//! A flag of the process that the running code may have set privately.

use pyo3::exceptions::PyNameError;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyString};
use pyo3::{PyTraverseError, PyVisit};

/// Accessor of the flag `name` of a module, for the module's own functions.
///
/// `.value` is `here()` if that is true, else the process's flag. A write sets the process's flag.
#[pyclass(frozen, module = "sglang_distguard._core")]
pub struct OwnFlag {
    globals: Py<PyDict>,
    name: Py<PyString>,
    here: Py<PyAny>,
}

#[pymethods]
impl OwnFlag {
    #[new]
    fn new(globals: Py<PyDict>, name: Py<PyString>, here: Py<PyAny>) -> Self {
        Self {
            globals,
            name,
            here,
        }
    }

    #[getter]
    fn value(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        let here = self.here.call0(py)?;
        if here.is_truthy(py)? {
            return Ok(here);
        }
        let name = self.name.bind(py);
        match self.globals.bind(py).get_item(name)? {
            Some(value) => Ok(value.unbind()),
            None => Err(PyNameError::new_err(format!(
                "name '{name}' is not defined"
            ))),
        }
    }

    #[setter]
    fn set_value(&self, py: Python<'_>, value: Py<PyAny>) -> PyResult<()> {
        self.globals.bind(py).set_item(self.name.bind(py), value)
    }

    fn __repr__(&self) -> String {
        format!("<OwnFlag {}>", self.name)
    }

    #[allow(clippy::needless_pass_by_value)]
    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.globals)?;
        visit.call(&self.here)
    }
}
