//! `kvmesh simulate`: the command line as a whole, for the binary and for Python.

use std::{ffi::OsString, time::Duration};

use clap::{Parser, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};

use crate::{Error, Result, cli::Args, fit, watch::Watch};

/// Exit status of an error; of wrong usage, which clap has; of an interruption, as shells have it.
const FAILED: u8 = 1;
const USAGE: u8 = 2;
const INTERRUPTED: u8 = 130;

/// Simulates a mesh: a trace, engines, and one or more routers.
///
/// The routers are kvmesh's own code over its own prefix index; the engines have continuous batching, chunked prefill and a
/// paged prefix cache, and take the time that a model says. The same seed gives the same result.
#[derive(Debug, Parser)]
#[command(
    name = "kvmesh simulate",
    bin_name = "kvmesh simulate",
    args_conflicts_with_subcommands = true,
    after_help = "Examples:
  kvmesh simulate --trace conversation_trace.jsonl --workers 8 --router kv,round-robin
  kvmesh simulate --trace azure.csv --prefill 6 --decode 2 --rate 2 --slo-ttft-ms 500 --json
  kvmesh simulate --requests 100000 --per-second 80 --workers 16 --max-held 1024
  kvmesh simulate --trace conversation_trace.jsonl --rate 2 --host-blocks 50000
  kvmesh simulate fit requests.jsonl --out rates.json && kvmesh simulate --rates rates.json"
)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    run: Args,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Fits the timing model to what an engine was measured to take.
    Fit(fit::Args),
}

/// A progress bar on the terminal, if stderr is one, that asks whether to go on.
pub(crate) struct Bar<'a> {
    bar: ProgressBar,
    stopped: &'a dyn Fn() -> bool,
}

impl<'a> Bar<'a> {
    pub(crate) fn new(title: &str, stopped: &'a dyn Fn() -> bool) -> Self {
        let bar = ProgressBar::new(0).with_message(title.to_owned());
        if let Ok(style) = ProgressStyle::with_template("{msg} {wide_bar} {percent:>3} %  {eta}") {
            bar.set_style(style);
        }
        bar.enable_steady_tick(Duration::from_millis(500));
        Self { bar, stopped }
    }
}

impl Watch for Bar<'_> {
    fn goes_on(&mut self, ended: usize, of: usize) -> bool {
        self.bar.set_length(of as u64);
        self.bar.set_position(ended as u64);
        !(self.stopped)()
    }
}

impl Drop for Bar<'_> {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// Runs a command line, without the program's name in it, and returns its exit status. `stopped` is asked now and
/// then whether to give up.
pub fn main(words: impl IntoIterator<Item = OsString>, stopped: &dyn Fn() -> bool) -> u8 {
    let words = std::iter::once(OsString::from("kvmesh simulate")).chain(words);
    let answer = match Cli::try_parse_from(words) {
        Ok(cli) => run(&cli, stopped),
        Err(error) => {
            // Help is no error, and goes to stdout.
            let _ = error.print();
            return if error.use_stderr() { USAGE } else { 0 };
        }
    };
    match answer {
        Ok(()) => 0,
        Err(Error::Interrupted) => INTERRUPTED,
        Err(error) => {
            eprintln!("error: {error}");
            FAILED
        }
    }
}

fn run<'a>(cli: &Cli, stopped: &'a dyn Fn() -> bool) -> Result<()> {
    match &cli.command {
        Some(Command::Fit(args)) => args.run(&mut Bar::new("fitting", stopped)),
        None => {
            let mut bar =
                |title: &str| -> Box<dyn Watch + 'a> { Box::new(Bar::new(title, stopped)) };
            cli.run.run_watched(&|_, _, _| None, &mut bar)
        }
    }
}
