//! Programs of everything that can happen to a selector, logged, and made again.

mod common;

use std::fs;

use kvmesh_replay::{Changes, Driver, Input, Options, ReplayError, Report, replay};
use kvmesh_select::{Config, GivenRates, Role};

use common::{Program, Table, log};

const SPLIT: [Role; 5] = [
    Role::Aggregated,
    Role::Prefill,
    Role::Prefill,
    Role::Decode,
    Role::Decode,
];

fn only(path: &std::path::Path, options: &Options) -> Report {
    let reports = replay(path, options).expect("a log");
    assert_eq!(reports.len(), 1);
    reports.into_iter().next().expect("one")
}

fn asking(policy: &str) -> Options {
    Options {
        policy: Some(policy.into()),
        rates: None,
    }
}

#[test]
fn the_same_choices_over_many_files() {
    for (seed, config) in [
        (1, Config::default()),
        (
            2,
            Config {
                temperature: 0.3,
                ..Config::default()
            },
        ),
        (
            3,
            Config {
                joint: false,
                ..Config::default()
            },
        ),
        (4, common::crowded()),
    ] {
        let directory = tempfile::tempdir().expect("a directory");
        let mut program = Program::new(config, &SPLIT, seed);
        program.driver.open_log(log(&directory, 40_000, 100));
        program.run(2_000);
        let placed = program.placed;
        let stats = program.driver.log_stats().expect("a log");
        program.driver.close_log();
        assert_eq!((stats.dropped, &stats.error), (0, &None));
        assert!(placed > 100 && fs::read_dir(&directory).expect("files").count() > 3);
        let report = only(directory.path(), &Options::default());
        assert_eq!(report.differences, []);
        assert_eq!((report.decisions, report.same), (placed, placed));
        assert_eq!((report.missing, report.skipped), (0, 0));
        if seed == 4 {
            assert!(report.refusals > 0, "nothing was refused");
        }
    }
}

#[test]
fn a_log_whose_beginning_is_gone_starts_from_a_snapshot() {
    let directory = tempfile::tempdir().expect("a directory");
    let mut program = Program::new(common::crowded(), &SPLIT, 5);
    program.driver.open_log(log(&directory, 60_000, 3));
    program.run(3_000);
    program.driver.close_log();
    let names = || {
        let mut names: Vec<String> = fs::read_dir(&directory)
            .expect("files")
            .map(|entry| {
                entry
                    .expect("file")
                    .file_name()
                    .into_string()
                    .expect("text")
            })
            .filter(|name| name.ends_with(".jsonl"))
            .collect();
        names.sort();
        names
    };
    assert_eq!(names().len(), 3);
    assert!(names()[0].as_str() > "tiny.00000002.jsonl");
    let report = only(directory.path(), &Options::default());
    assert_eq!(
        (report.files, report.differences.len(), report.skipped),
        (3, 0, 0)
    );
    assert_eq!(report.same, report.decisions);
    assert!(report.decisions > 20 && report.decisions < program.placed);
    // Each file stands for itself.
    let last = only(&directory.path().join(&names()[2]), &Options::default());
    assert_eq!((last.same, last.skipped), (last.decisions, 0));
    // A router that comes again goes on behind it.
    let mut program = Program::new(common::crowded(), &SPLIT, 6);
    let mut config = common::log_config(&directory, 1 << 30, 3);
    config.run = "two".into();
    program
        .driver
        .open_log(kvmesh_replay::Log::open(config).expect("a log"));
    program.run(100);
    program.driver.close_log();
    assert!(names()[2] > names()[1]);
    let report = only(directory.path(), &Options::default());
    assert_eq!((report.same, report.skipped), (report.decisions, 0));
}

#[test]
fn what_is_dropped_is_said() {
    let directory = tempfile::tempdir().expect("a directory");
    let mut config = common::log_config(&directory, 1 << 30, 10);
    // Hardly a line fits while another waits.
    config.max_queued = 600;
    let mut program = Program::new(Config::default(), &SPLIT, 7);
    program
        .driver
        .open_log(kvmesh_replay::Log::open(config).expect("a log"));
    program.run(3_000);
    let stats = program.driver.log_stats().expect("a log");
    program.driver.close_log();
    assert!(stats.dropped > 0);
    let report = only(directory.path(), &Options::default());
    assert_eq!(report.differences, []);
    assert_eq!(report.same, report.decisions);
    // The last gap may not have ended.
    assert!(report.missing > 0 && report.missing <= stats.dropped);
}

#[test]
fn a_changed_log_is_noticed_and_a_broken_one_refused() {
    let directory = tempfile::tempdir().expect("a directory");
    let mut program = Program::new(Config::default(), &SPLIT, 8);
    program.driver.open_log(log(&directory, 1 << 30, 10));
    program.run(500);
    program.driver.close_log();
    let path = directory.path().join("tiny.00000001.jsonl");
    let text = fs::read_to_string(&path).expect("text");
    // A router that died has left its last line unfinished.
    fs::write(&path, &text[..text.len() - 20]).expect("written");
    assert_eq!(only(&path, &Options::default()).differences, []);
    let forged = text.replacen(r#""prompt_tokens":"#, r#""prompt_tokens":1"#, 1);
    fs::write(&path, forged).expect("written");
    let report = only(&path, &Options::default());
    assert_eq!(report.differences.len(), 1);
    assert!(report.skipped > 0);
    fs::write(&path, text.replacen(r#"{"call""#, r#"{"cull""#, 1)).expect("written");
    let broken = replay(&path, &Options::default());
    assert!(
        matches!(broken, Err(ReplayError::Line { line: 3.., .. })),
        "{broken:?}"
    );
    let newer = text.replacen(r#""version":5"#, r#""version":6"#, 1);
    assert_ne!(newer, text);
    fs::write(&path, newer).expect("written");
    assert!(replay(&path, &Options::default()).is_err());
    let nothing = replay(&directory.path().join("no.jsonl"), &Options::default());
    assert!(matches!(nothing, Err(ReplayError::Nothing(_))));
}

#[test]
fn others_are_asked_and_change_nothing() {
    let directory = tempfile::tempdir().expect("a directory");
    let mut program = Program::new(common::immediate(), &SPLIT, 9);
    program.mixed = false;
    program.driver.open_log(log(&directory, 1 << 30, 10));
    program.run(3_000);
    program.driver.close_log();
    let itself = only(directory.path(), &asking("kv"));
    let kv = &itself.others[0];
    assert_eq!(itself.same, itself.decisions);
    assert_eq!((kv.policy.as_str(), kv.decisions), ("kv", itself.decisions));
    // Where two are as good as equal, chance is its own.
    assert!(kv.regret_ms.abs() < 1.0, "{kv:?}");
    let other = only(directory.path(), &asking("round-robin"));
    let turns = &other.others[0];
    assert_eq!(other.same, other.decisions);
    assert!(
        turns.differ > turns.decisions / 4 && turns.regret_ms < -1.0,
        "{turns:?}"
    );
    assert!(turns.ttft_ms > turns.chosen_ttft_ms);
    assert!(replay(directory.path(), &asking("kvv")).is_err());

    // By rates in which computing costs nothing, caches are worth nothing.
    let laws = [
        ("token", 0.0),
        ("pass", 1.0),
        ("token_squared", 0.0),
        ("token_by_position", 0.0),
    ];
    let laws = laws
        .map(|(name, ms)| (name.to_owned(), ms))
        .into_iter()
        .collect();
    let prefill = [("prefill".to_owned(), laws)].into_iter().collect();
    let rates: GivenRates = [("test".to_owned(), prefill)].into_iter().collect();
    let options = Options {
        policy: None,
        rates: Some(rates),
    };
    let report = only(directory.path(), &options);
    assert_eq!(report.same, report.decisions);
    assert_eq!(report.others[0].policy, "kv by the rates given");
    assert!(report.others[0].chosen_cost_ms < kv.chosen_cost_ms);
}

#[test]
fn shadows_leave_everything_as_it_is() {
    let run = |shadows: &[&str]| {
        let mut program = Program::new(Config::default(), &SPLIT, 10);
        let changes = Changes {
            shadows: Some(shadows.iter().map(|name| (*name).to_owned()).collect()),
            ..Changes::default()
        };
        program.driver.set(0.0, changes, |_| None).expect("known");
        program.keep = true;
        program.run(2_000);
        program
    };
    let (alone, watched) = (
        run(&[]),
        run(&["round-robin", "random", "least-loaded", "kv", "session"]),
    );
    assert_eq!(alone.kept.len(), watched.kept.len());
    for (one, other) in alone.kept.iter().zip(&watched.kept) {
        assert_eq!(
            (one.lease, one.winner, one.held_ms),
            (other.lease, other.winner, other.held_ms)
        );
        assert_eq!(other.shadows.len(), 5);
    }
    let differ = |at: usize| {
        let all = watched.kept.iter();
        all.filter(|one| !one.shadows[at].agrees(&one.winner))
            .count()
    };
    assert!(differ(0) > differ(3));
    let mut driver = Driver::new(
        kvmesh_select::Selector::new(Config::default()),
        Table::default(),
        1,
    );
    let unknown = Changes {
        shadows: Some(vec!["kvv".into()]),
        ..Changes::default()
    };
    assert!(driver.set(0.0, unknown, |_| None).is_err());
}

#[test]
fn changes_are_in_the_log_and_replayed() {
    let directory = tempfile::tempdir().expect("a directory");
    let mut program = Program::new(Config::default(), &SPLIT, 11);
    program.driver.open_log(log(&directory, 1 << 30, 10));
    program.run(500);
    let changes = Changes {
        by: "an operator".into(),
        policy: Some("least-loaded".into()),
        temperature: Some(0.2),
        max_held: Some(3),
        max_wait_ms: Some(70.0),
        shadows: Some(vec!["kv".into()]),
    };
    let now = program.now;
    program
        .driver
        .set(now, changes.clone(), |_| None)
        .expect("known");
    program.run(1_000);
    program.driver.close_log();
    let report = only(directory.path(), &Options::default());
    assert_eq!(
        (report.differences.len(), report.same),
        (0, report.decisions)
    );
    let at = 1_000.0 + program_at(now);
    assert_eq!(report.changes, [(at, changes)]);
    assert_eq!(report.others[0].policy, "kv in the log");
    assert!(report.others[0].decisions > 0);
    // Who reads the lines finds the regret there.
    let lines = fs::read_to_string(directory.path().join("tiny.00000001.jsonl")).expect("text");
    let regrets: Vec<f64> = lines.lines().flat_map(regrets_of).collect();
    assert_eq!(regrets.len() as u64, report.others[0].decisions);
    let mean = regrets.iter().sum::<f64>() / regrets.len() as f64;
    assert!((mean - report.others[0].regret_ms).abs() < 1e-9);
    assert!(mean > 1.0, "{mean}");
}

/// Of the shadows in one line; each is what the live choice costs more than the shadow's.
fn regrets_of(line: &str) -> Vec<f64> {
    let line: serde_json::Value = serde_json::from_str(line).expect("JSON");
    let placements = line["call"]["out"].as_array().into_iter().flatten();
    let shadows = placements.filter_map(|one| one["placed"]["shadows"].as_array());
    let number = |value: &serde_json::Value| value.as_f64().expect("a number");
    let regret = |one: &serde_json::Value| {
        let regret = number(&one["regret"]);
        assert_eq!(regret, number(&one["live_cost"]) - number(&one["cost"]));
        regret
    };
    shadows.flatten().map(regret).collect()
}

fn program_at(now: f64) -> f64 {
    now / 1_000.0
}

#[test]
fn policies_from_outside_are_quoted() {
    let directory = tempfile::tempdir().expect("a directory");
    let mut program = Program::new(Config::default(), &SPLIT, 12);
    program.driver.open_log(log(&directory, 100_000, 50));
    program
        .driver
        .add_policy(0.0, "odd".into(), (common::odd(), common::odd()));
    program.external = true;
    program.run(3_000);
    program.driver.close_log();
    let report = only(directory.path(), &Options::default());
    assert_eq!(report.differences, []);
    assert_eq!(report.same, report.decisions);
    assert!(report.files > 1);
}

#[test]
fn a_directory_has_one_writer() {
    let directory = tempfile::tempdir().expect("a directory");
    let first = log(&directory, 1 << 20, 2);
    let config = || common::log_config(&directory, 1 << 20, 2);
    assert!(kvmesh_replay::Log::open(config()).is_err());
    drop(first);
    assert!(kvmesh_replay::Log::open(config()).is_ok());
}

#[test]
fn a_disk_that_fails_is_tried_again() {
    let parent = tempfile::tempdir().expect("a directory");
    let path = parent.path().join("log");
    let mut config = common::log_config(&parent, 1 << 20, 4);
    config.directory.clone_from(&path);
    let mut program = Program::new(Config::default(), &SPLIT, 13);
    program
        .driver
        .open_log(kvmesh_replay::Log::open(config).expect("a log"));
    fs::remove_dir_all(&path).expect("removed");
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
    while program
        .driver
        .log_stats()
        .is_some_and(|stats| stats.error.is_none())
    {
        assert!(std::time::Instant::now() < deadline);
        program.driver.call(program.now, Input::Tick);
        std::thread::yield_now();
    }
    program.driver.call(program.now, Input::Tick);
    fs::create_dir(&path).expect("made");
    program.now += 10_000.0;
    program.run(200);
    program.driver.close_log();
    let report = only(&path, &Options::default());
    assert!(report.missing > 0 && report.decisions > 0);
    assert_eq!(report.same, report.decisions);
}
