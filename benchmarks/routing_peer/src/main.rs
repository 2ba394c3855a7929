//! kvmesh's simulator with a peer's routers added: `dynamo`, and with a scale of prefill load `dynamo-10`.

mod dynamo;

use std::process::ExitCode;

use clap::Parser;
use kvmesh_sim::{cli::Args, cluster::Cluster, router::Router};

fn make(name: &str, cluster: &Cluster, seed: u64) -> Option<Box<dyn Router>> {
    let scale = match name.strip_prefix("dynamo")? {
        "" => 1.0,
        scale => scale.strip_prefix('-')?.parse().ok()?,
    };
    Some(Box::new(dynamo::Dynamo::new(cluster, scale, seed)))
}

fn main() -> ExitCode {
    match Args::parse().run(&make) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("routing-peer: {error}");
            ExitCode::FAILURE
        }
    }
}
