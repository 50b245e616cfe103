//! Hysteresis: loads and links that make a naive rule flap.

use super::*;
use crate::policy::{Cause, simulate::log::LogLine};

const MIB: u64 = 1 << 20;
const MINUTE: u64 = 60_000;
const HOUR: u64 = 60 * MINUTE;

/// What the link takes in these tests, bytes a second.
const LINK: u64 = 100 * MIB;

fn load(length_ms: u64, pattern: Pattern, noise_permille: u32, shape: impl Fn(u64) -> u64 + 'static) -> Shaped {
    Shaped { length_ms, block_bytes: MIB, shape: Box::new(shape), noise_permille, pattern, seed: 42 }
}

fn scenario(workload: &Shaped) -> Scenario<'_> {
    Scenario {
        workload,
        link: LinkModel::steady(LINK, 20),
        pair: PairModel::default(),
        policy: PolicyConfig::default(),
    }
}

fn adaptive(scenario: &Scenario<'_>) -> Outcome {
    simulate(scenario, Strategy::Adaptive, |_| {})
}

fn naive(scenario: &Scenario<'_>) -> Outcome {
    simulate(scenario, Strategy::Naive(scenario.policy.fill_enter), |_| {})
}

/// Prints both, and wants the policy to keep the promises of this module: nothing overflows, it ends in step, and
/// leaves at most `departures` times.
fn promises(name: &str, scenario: &Scenario<'_>, departures: u64) -> (Outcome, Outcome) {
    let (ours, theirs) = (adaptive(scenario), naive(scenario));
    for outcome in [&ours, &theirs] {
        println!(
            "{name}: {:?} left {} times, returned {} times, overflow {} ms, delta {} s of {} s, age {} s, wire {} MiB",
            outcome.strategy,
            outcome.departures,
            outcome.returns,
            outcome.overflow_ms,
            outcome.delta_ms() / 1000,
            outcome.duration_ms / 1000,
            outcome.age_ms_max / 1000,
            outcome.wire_bytes() / MIB,
        );
    }
    assert_eq!(ours.overflow_ms, 0, "{name} overflows");
    assert!(ours.complete, "{name} does not catch up");
    assert!(ours.departures <= departures, "{name} leaves {} times: {:#?}", ours.departures, ours.transitions);
    (ours, theirs)
}

#[test]
fn a_square_wave_costs_one_round_trip_a_burst_at_most() {
    for (on, off) in [(20, 100), (60, 240), (30, 30), (300, 600), (2, 58)] {
        let period = on + off;
        let bursts = 2 * HOUR / 1000 / period;
        let workload =
            load(
                2 * HOUR,
                Pattern::Uniform(20_000),
                100,
                move |at| {
                    if at / 1000 % period < on { 2 * LINK } else { 5 * MIB }
                },
            );
        let (ours, _) = promises(&format!("square wave {on} s in {period} s"), &scenario(&workload), bursts);
        // Damped, it still lets the backup follow; unless the link is too slow on average, when runs follow the
        // schedule.
        if on * 2 < period * 9 / 10 {
            assert!(ours.age_ms_max < (on + 300) * 2000, "{}", ours.age_ms_max);
        }
    }
}

#[test]
fn a_ramp_is_one_round_trip() {
    // From a fifth of the link to twice of it and back within an hour.
    let workload = load(HOUR, Pattern::Uniform(20_000), 100, |at| {
        let up = at.min(HOUR - at) * 2;
        LINK / 5 + (LINK * 9 / 5) * up / HOUR
    });
    let scenario = scenario(&workload);
    let (ours, _) = promises("ramp", &scenario, 2);
    assert!(ours.departures >= 1);
}

#[test]
fn a_link_at_the_rate_of_the_writes_does_not_make_it_flap() {
    for percent in [95, 98, 100, 102, 105] {
        let workload = load(4 * HOUR, Pattern::Uniform(20_000), 200, move |_| LINK * percent / 100);
        let mut scenario = scenario(&workload);
        scenario.link.noise_permille = 200;
        let (ours, theirs) = promises(&format!("writes at {percent} % of the link"), &scenario, 4 * 4);
        if percent >= 100 {
            assert!(
                theirs.departures >= 10 * ours.departures.max(1),
                "the naive rule left {} times, which is no flapping against {}",
                theirs.departures,
                ours.departures
            );
        }
    }
}

#[test]
fn a_throttled_stream_is_not_taken_for_a_fast_link() {
    let workload = load(HOUR, Pattern::Uniform(5000), 100, |at| if at < 20 * MINUTE { LINK / 2 } else { LINK / 10 });
    let mut scenario = scenario(&workload);
    scenario.policy.stream_bytes_per_second = LINK / 4;
    let (ours, _) = promises("throttled stream", &scenario, 1);
    assert_eq!((ours.departures, ours.returns), (1, 1));
    let continuous = simulate(&scenario, Strategy::Continuous, |_| {});
    assert!(continuous.age_ms_max > 15 * MINUTE, "{}", continuous.age_ms_max);
}

#[test]
fn a_brown_out_is_one_round_trip() {
    let workload = load(2 * HOUR, Pattern::Uniform(20_000), 100, |_| LINK / 2);
    let mut scenario = scenario(&workload);
    scenario.policy.interval = std::time::Duration::from_secs(300);
    scenario.link.rates = vec![(0, LINK), (20 * MINUTE, LINK / 10), (40 * MINUTE, LINK)];
    let (ours, _) = promises("brown-out", &scenario, 1);
    assert_eq!((ours.departures, ours.returns), (1, 1));
}

#[test]
fn a_link_that_breaks_again_and_again_is_not_followed_each_time() {
    let workload = load(2 * HOUR, Pattern::Uniform(20_000), 100, |_| LINK / 4);
    let mut scenario = scenario(&workload);
    // Five seconds out of thirty.
    scenario.link.outages = (0..4 * 60).map(|n| (n * 30_000 + 20_000, n * 30_000 + 25_000)).collect();
    let (ours, theirs) = promises("link that breaks twice a minute", &scenario, 20);
    assert!(theirs.departures >= 100, "{}", theirs.departures);
    assert!(ours.age_ms_max < 10 * MINUTE, "{}", ours.age_ms_max);
}

#[test]
fn a_hot_workload_that_fires_redundancy_for_ever_neither_overflows_nor_loops() {
    // Fifty blocks are rewritten at once and a half of what the link takes: each is retained many times.
    let workload = load(2 * HOUR, Pattern::Uniform(50), 100, |_| LINK * 3 / 2);
    let mut scenario = scenario(&workload);
    let redundant =
        |outcome: &Outcome| outcome.transitions.iter().filter(|t| t.why.starts_with("start redundancy")).count();
    let (ours, _) = promises("hot blocks", &scenario, 2 * 60);
    println!("hot blocks: {} redundancy runs", redundant(&ours));
    assert!(redundant(&ours) >= 1);

    // The link keeps up on average, and short bursts are what is redundant: that is what the criterion is for.
    let workload = load(2 * HOUR, Pattern::Uniform(50), 100, |at| if at / 1000 % 90 < 3 { 3 * LINK } else { LINK / 2 });
    scenario.workload = &workload;
    let (ours, _) = promises("hot bursts", &scenario, 2 * 60);
    println!("hot bursts: {} redundancy runs", redundant(&ours));
    assert!(redundant(&ours) >= 60, "{}", redundant(&ours));
    // And it pays: less on the wire than continuous mode sends.
    let continuous = simulate(&scenario, Strategy::Continuous, |_| {});
    assert!(ours.wire_bytes() < continuous.wire_bytes());
}

#[test]
fn bytes_on_the_wire_lie_between_the_optimum_and_continuous() {
    for pattern in [
        Pattern::Sequential(200_000),
        Pattern::Uniform(5000),
        Pattern::HotSpot { hot: 100, all: 20_000 },
        Pattern::Zipf(20_000),
    ] {
        let workload = load(HOUR, pattern, 100, |at| if at / 1000 % 600 < 120 { 2 * LINK } else { LINK / 5 });
        let comparison = compare(&scenario(&workload), &mut Samples::new());
        let Comparison { written_bytes, continuous, delta, adaptive, optimum_bytes } = &comparison;
        println!(
            "{pattern:?}: written {} MiB; on the wire continuous {} (age {} s), delta {} (age {} s), adaptive {} (age {} s), optimum {}",
            written_bytes / MIB,
            continuous.wire_bytes() / MIB,
            continuous.age_ms_max / 1000,
            delta.wire_bytes() / MIB,
            delta.age_ms_max / 1000,
            adaptive.wire_bytes() / MIB,
            adaptive.age_ms_max / 1000,
            optimum_bytes / MIB,
        );
        assert_eq!(continuous.wire_bytes(), *written_bytes);
        assert!(*optimum_bytes <= adaptive.wire_bytes());
        assert!(adaptive.wire_bytes() <= continuous.wire_bytes() * 105 / 100);
        assert!(continuous.overflow_ms > 0 && delta.overflow_ms == 0 && adaptive.overflow_ms == 0);
        assert!(delta.complete && adaptive.complete && continuous.complete);
    }
}

/// An observation log that is written while the policy decides gives the same decisions again, to the byte; cut
/// anywhere it does, too, from the state at the cut.
#[test]
fn a_log_is_replayed_exactly() {
    let workload = load(HOUR, Pattern::HotSpot { hot: 50, all: 5000 }, 300, |at| {
        if at / 1000 % 400 < 60 { 2 * LINK } else { LINK / 5 }
    });
    let mut scenario = scenario(&workload);
    scenario.link.outages = vec![(10 * MINUTE, 12 * MINUTE), (40 * MINUTE, 41 * MINUTE)];
    let (mut whole, mut tail) = (Vec::new(), Vec::new());
    let mut policy = GroupPolicy::new();
    let line = |log: &mut Vec<u8>, line: &LogLine| {
        serde_json::to_writer(&mut *log, line).unwrap();
        log.push(b'\n');
    };
    let group = || "data".to_owned();
    line(&mut whole, &LogLine::Policy { policy: Box::new(scenario.policy.clone()) });
    let ours = simulate(&scenario, Strategy::Adaptive, |tick| {
        let Some((obs, decision)) = tick.weighed else { return };
        if tail.is_empty() && tick.now_ms > 11 * MINUTE {
            line(&mut tail, &LogLine::Policy { policy: Box::new(scenario.policy.clone()) });
            line(&mut tail, &LogLine::State { group: group(), state: Box::new(policy.clone()) });
        }
        policy.on_observation(&scenario.policy, obs);
        for log in [&mut whole, &mut tail] {
            if log.is_empty() {
                continue;
            }
            line(log, &LogLine::Observation { group: group(), observation: Box::new(obs.clone()) });
            line(log, &LogLine::Decision { group: group(), decision: Box::new(decision.clone()) });
        }
    });
    assert!(ours.departures >= 3);
    for log in [&whole, &tail] {
        let replayed = log::replay(&log[..], None, |_| {}).unwrap();
        let data = &replayed.groups["data"];
        assert!(data.compared > 1000);
        assert_eq!((data.different, &data.first_difference), (0, &None));
        assert!(data.actions.len() >= 3);
    }
    // Without the state at the cut, or by another policy, it is noticed.
    let headless: Vec<u8> = tail.split(|byte| *byte == b'\n').skip(2).collect::<Vec<_>>().join(&b'\n');
    let lost = log::replay(&headless[..], None, |_| {}).unwrap();
    assert!(lost.groups["data"].different > 0);
    let other = PolicyConfig { fill_enter: Ratio::from_millionths(100_000), ..scenario.policy.clone() };
    assert!(log::replay(&whole[..], Some(&other), |_| {}).unwrap().groups["data"].different > 0);
}

#[test]
fn what_is_no_log_is_refused_with_its_line() {
    for (text, part) in [
        ("{\"line\":\"policy\",\"policy\":{\"policy.fill_enter\":\"2\"}}\n", "line 1"),
        ("\n{\"line\":\"weather\"}\n", "line 2"),
        (
            "{\"line\":\"decision\",\"group\":\"g\",\"decision\":{\"action\":{\"do\":\"none\"},\"cause\":null,\"holds\":[],\"because\":[],\"alternative\":\"\"}}",
            "without an observation",
        ),
    ] {
        let error = log::replay(text.as_bytes(), None, |_| {}).unwrap_err().to_string();
        assert!(error.contains(part), "{text}: {error}");
    }
}

#[test]
fn a_run_is_drawn_with_every_phase_it_was_in() {
    let workload =
        load(30 * MINUTE, Pattern::Uniform(5000), 0, |at| if at / 1000 % 600 < 60 { 2 * LINK } else { LINK / 5 });
    let scenario = scenario(&workload);
    let mut samples = Samples::new();
    let ours = simulate(&scenario, Strategy::Adaptive, |tick| samples.on_tick(tick));
    let svg = plot::svg("30 min <demo>", &samples, scenario.pair.capacity_bytes);
    assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n"));
    assert!(svg.contains("30 min &lt;demo&gt;") && svg.matches("<polyline").count() == 4);
    assert!(svg.len() < 1 << 20 && ours.phase_ms.contains_key(&Phase::Round));
    assert_eq!(ours.transitions[0].from, Phase::Streaming);
    assert!(ours.transitions[0].why.contains(Cause::Imbalance.as_str()), "{:?}", ours.transitions[0]);
}
