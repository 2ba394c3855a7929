//! The Python module `kvmesh.core`: registers classes and nothing else.

mod answer;
mod error;
mod hash;
mod http;
mod index;
mod integers;
mod kvbm;
mod select;
mod simulate;
mod streams;
mod text;
mod tiered;
mod wire;

use pyo3::prelude::*;

#[pymodule]
fn core(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(hash::hash_tokens, module)?)?;
    module.add_class::<hash::HashChain>()?;
    module.add_function(wrap_pyfunction!(hash::namespace_seed, module)?)?;
    module.add_function(wrap_pyfunction!(hash::event_namespace_seed, module)?)?;
    module.add_function(wrap_pyfunction!(integers::largest_token, module)?)?;
    module.add_function(wrap_pyfunction!(wire::packed_field, module)?)?;
    module.add_function(wrap_pyfunction!(wire::read_steps, module)?)?;
    module.add_function(wrap_pyfunction!(http::read_plain_request, module)?)?;
    module.add_class::<index::PyPrefixIndex>()?;
    module.add_function(wrap_pyfunction!(kvbm::page_digests, module)?)?;
    module.add_class::<kvbm::StoreServer>()?;
    module.add_class::<kvbm::Warming>()?;
    module.add_class::<kvbm::Lent>()?;
    module.add_class::<kvbm::Incoming>()?;
    module.add("FIRST_WORD", kvmesh_kvbm::store::WORD)?;
    module.add_class::<kvbm::StoreClient>()?;
    module.add_class::<tiered::TieredStore>()?;
    module.add_class::<kvbm::Lease>()?;
    module.add_class::<kvbm::Pages>()?;
    module.add_class::<streams::PyStreams>()?;
    module.add_class::<text::PyTextModel>()?;
    module.add_class::<text::PyTextStream>()?;
    module.add_class::<text::PyTextDelta>()?;
    module.add(
        "TOOL_FORMATS",
        kvmesh_text::ToolFormat::all_names().collect::<Vec<_>>(),
    )?;
    module.add(
        "REASONING_FORMATS",
        kvmesh_text::ReasoningFormat::names().collect::<Vec<_>>(),
    )?;
    module.add_class::<select::PySelector>()?;
    module.add_class::<select::PyPlaced>()?;
    module.add_class::<select::PyRefused>()?;
    module.add_function(wrap_pyfunction!(select::replay, module)?)?;
    module.add("TERMS", kvmesh_select::Terms::NAMES)?;
    module.add(
        "POLICIES",
        kvmesh_select::PolicyName::ALL.map(kvmesh_select::PolicyName::name),
    )?;
    module.add_function(wrap_pyfunction!(simulate::simulate, module)?)?;
    module.add(
        "CorruptBlockError",
        module.py().get_type::<kvbm::CorruptBlockError>(),
    )?;
    Ok(())
}
