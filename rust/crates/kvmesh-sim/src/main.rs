//! `kvmesh-sim`: what `kvmesh simulate` runs, without Python.

use std::process::ExitCode;

fn main() -> ExitCode {
    ExitCode::from(kvmesh_sim::command::main(
        std::env::args_os().skip(1),
        &|| false,
    ))
}
