//! Decisions of NVIDIA Dynamo's selection core (`dynamo-kv-router` 1.6.1, `standalone-selection`) in its caller's process, under
//! the load of `benchmarks/router.py`.
//!
//!     decisions WORKERS BLOCKS ROUNDS
//!
//! It is given hashes, as kvmesh's router is. Prints microseconds as JSON: a selection with its booking, and a whole cycle.

use std::{
    collections::VecDeque,
    sync::Arc,
    time::{Duration, Instant},
};

use dynamo_kv_router::{
    KvRouterConfig, LocalBlockHash, RouterEvent, WorkerSelectionPolicy,
    identity::RoutingPartitionId,
    indexer::KvIndexerInterface,
    protocols::{
        ExternalSequenceBlockHash, KvCacheEvent, KvCacheEventData, KvCacheStoreData,
        KvCacheStoredBlockData, RoutingConstraints, StorageTier,
    },
    services::{
        indexer::backend::Indexer,
        selection::{
            PromptRequest, SelectAndReserveRequest, SelectionCacheConfig, SelectionCore,
            WorkerRequest,
        },
    },
};
use rand::RngCore;
use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
use tokio_util::sync::CancellationToken;

const BLOCK_TOKENS: u32 = 16;
const PROMPTS: usize = 64;
const NAME: &str = "default";

/// A prompt's hashes: of each block alone, and of all up to it.
struct Prompt {
    blocks: Vec<i64>,
    sequence: Vec<i64>,
}

impl Prompt {
    fn new(blocks: usize, chance: &mut ChaCha8Rng) -> Self {
        let mut hashes = || (0..blocks).map(|_| chance.next_u64() as i64).collect();
        Self {
            blocks: hashes(),
            sequence: hashes(),
        }
    }

    fn tokens(&self) -> usize {
        self.blocks.len() * BLOCK_TOKENS as usize + 1
    }

    fn request(&self, id: &str) -> SelectAndReserveRequest {
        SelectAndReserveRequest {
            model_name: NAME.into(),
            routing_group: NAME.into(),
            selection_id: Some(id.into()),
            prompt: PromptRequest {
                block_hashes: Some(self.blocks.clone()),
                sequence_hashes: Some(self.sequence.clone()),
                isl_tokens: Some(self.tokens()),
                ..PromptRequest::default()
            },
            router_config_override: None,
            expected_output_tokens: None,
            priority_jump: None,
            strict_priority: None,
            session_id: None,
            session_context: None,
            affinity_target: None,
            pinned_worker: None,
            allowed_worker_ids: None,
            routing_constraints: RoutingConstraints::default(),
        }
    }

    /// That a worker has half of it.
    fn stored(&self, worker: u64, event_id: u64) -> RouterEvent {
        let hashes = self.blocks.iter().zip(&self.sequence);
        let blocks = hashes
            .take(self.blocks.len() / 2)
            .map(|(&block, &sequence)| KvCacheStoredBlockData {
                block_hash: ExternalSequenceBlockHash(sequence as u64),
                tokens_hash: LocalBlockHash(block as u64),
                mm_extra_info: None,
            })
            .collect();
        let event = KvCacheEvent {
            event_id,
            data: KvCacheEventData::Stored(KvCacheStoreData {
                parent_hash: None,
                start_position: None,
                blocks,
            }),
            dp_rank: 0,
        };
        RouterEvent::with_storage_tier(worker, event, StorageTier::Device)
    }
}

/// With its defaults, and with workers of which every eighth has half of every prompt.
async fn core(workers: u64, prompts: &[Prompt]) -> SelectionCore {
    let config = KvRouterConfig {
        use_kv_events: true,
        ..KvRouterConfig::default()
    };
    let core = SelectionCore::try_new_local(
        config,
        1,
        CancellationToken::new(),
        SelectionCacheConfig::default(),
        Arc::new(|config, role, _| {
            WorkerSelectionPolicy::reference(config.clone(), role.default_selector_label())
        }),
    )
    .expect("a core");
    for worker in 0..workers {
        let request = WorkerRequest {
            worker_id: worker,
            endpoint: Some(format!("http://worker-{worker}:8000")),
            // Nobody is there: what workers have is told below.
            kv_events_endpoint: Some(format!("tcp://127.0.0.1:{}", 30_000 + worker)),
            block_size: Some(BLOCK_TOKENS),
            max_num_batched_tokens: Some(8_192),
            total_kv_blocks: Some(100_000),
            ..WorkerRequest::default()
        };
        core.upsert_worker(request).await.expect("a worker");
    }
    let partition = core.partition(&RoutingPartitionId::new(NAME, NAME));
    let indexer = partition.expect("a partition").indexer().clone();
    for worker in (0..workers).step_by(8) {
        for (event, prompt) in (1..).zip(prompts) {
            let stored = prompt.stored(worker, event);
            indexer.apply_event_routed(stored).await.expect("an event");
        }
    }
    match &indexer {
        Indexer::Single { primary, .. } => drop(primary.flush().await),
        Indexer::Concurrent { primary, .. } => primary.flush().await,
        _ => {}
    }
    core
}

async fn measure(workers: u64, blocks: usize, rounds: u64) -> String {
    let mut chance = ChaCha8Rng::seed_from_u64(1);
    let prompts: Vec<_> = (0..PROMPTS)
        .map(|_| Prompt::new(blocks, &mut chance))
        .collect();
    let core = core(workers, &prompts).await;
    let mut live = VecDeque::new();
    let (mut decisions, mut cycles) = (Vec::new(), Vec::new());
    let mut cached = 0;
    for number in 1..rounds + 4 * workers {
        let (id, prompt) = (number.to_string(), &prompts[number as usize % PROMPTS]);
        let request = prompt.request(&id);
        let began = Instant::now();
        let placed = core.select_and_reserve(request).await.expect("a worker");
        let decided = began.elapsed();
        cached += usize::from(placed.effective_prefill_tokens < prompt.tokens());
        core.prefill_complete(&id).await.expect("a booking");
        live.push_back(id);
        if live.len() as u64 > 4 * workers {
            let oldest = live.pop_front().expect("a booking");
            core.free_reservation(&oldest).await.expect("a booking");
            decisions.push(decided);
            cycles.push(began.elapsed());
        }
    }
    assert!(cached > 0, "no prompt was found cached");
    let us = |times: &mut Vec<Duration>, part: f64| {
        times.sort_unstable();
        times[(times.len() as f64 * part) as usize].as_secs_f64() * 1e6
    };
    format!(
        "{{\"decision\": {:.2}, \"p99\": {:.2}, \"cycle\": {:.2}}}",
        us(&mut decisions, 0.5),
        us(&mut decisions, 0.99),
        us(&mut cycles, 0.5)
    )
}

fn main() {
    let arguments: Vec<u64> = std::env::args()
        .skip(1)
        .map(|argument| argument.parse().expect("a number"))
        .collect();
    let &[workers, blocks, rounds] = arguments.as_slice() else {
        panic!("decisions WORKERS BLOCKS ROUNDS");
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    println!(
        "{}",
        runtime.block_on(measure(workers, blocks as usize, rounds))
    );
}
