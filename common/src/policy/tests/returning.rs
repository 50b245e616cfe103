use super::*;

#[test]
fn the_link_comes_back_and_so_does_the_group() {
    let mut group = Group::new();
    group.link(false);
    assert_eq!(group.until_action(3).action, Action::Switch { cause: Cause::LinkDown });
    group.obs.dirty_bytes = 600 * MIB;
    group.quiet_for(600);
    group.link(true);
    // A round first: nobody knows what the link can take.
    assert_eq!(group.until_action(3).action, Action::StartRun { kind: RunKind::Round });
    assert_eq!(group.obs.now_ms - group.obs.link_since_ms, 2000);
    // 600 MiB in 10 s while 100 MiB are written: the rest takes 1.7 s, 17 MiB, which fits 512 MiB.
    group.run_ends(10_000, true, 100 * MIB);
    let decision = group.step();
    assert_eq!(decision.action, Action::StartRun { kind: RunKind::Final });
    let fits = decision.reason(Rule::FinalFits).unwrap();
    assert_eq!((fits.threshold, fits.verdict), (512 * MIB, Verdict::Ready));
    assert!(fits.value.unwrap() < 20 * MIB);
    group.run_ends(1700, true, 0);
    assert_eq!(group.obs.phase, Phase::Streaming);
    assert_eq!(group.weigh().cause, None);
    group.quiet_for(3600);
}

#[test]
fn while_a_cause_holds_runs_follow_the_schedule() {
    for (schedule, first) in [(Schedule::Periodic, Some(1800)), (Schedule::Prompted, None), (Schedule::Idle, Some(30))]
    {
        let mut group = Group::in_delta(Cause::Operator);
        group.obs.operator.hold_delta = true;
        group.config.schedule = schedule;
        (group.obs.usage_bytes_per_s, group.obs.link_bytes_per_s) = (0, 0);
        let start = group.obs.now_ms;
        let decision = group.until_action(7200);
        match first {
            Some(seconds) => {
                assert_eq!(decision.action, Action::StartRun { kind: RunKind::Round });
                assert!((group.obs.now_ms - start).abs_diff(seconds * 1000) <= 500, "{schedule}");
                group.run_ends(60_000, true, MIB);
                assert_eq!((group.obs.phase, group.weigh().cause), (Phase::Tracking, Some(Cause::Operator)));
            }
            None => assert_eq!(group.actions, []),
        }
        // On demand at once, by any schedule.
        group.obs.operator.start_run = true;
        assert_eq!(group.until_action(1).action, Action::StartRun { kind: RunKind::Round });
        group.run_ends(1000, true, 0);
        group.quiet_for(3600);
        group.obs.operator.hold_delta = false;
        assert_eq!(group.until_action(5).action, Action::StartRun { kind: RunKind::Final });
    }
}

#[test]
fn a_busy_group_never_runs_by_the_idle_schedule() {
    let mut group = Group::in_delta(Cause::Operator);
    group.obs.operator.hold_delta = true;
    group.config.schedule = Schedule::Idle;
    group.quiet_for(3600);
}

#[test]
fn a_schedule_that_cannot_be_kept_says_so() {
    let mut group = Group::in_delta(Cause::Operator);
    group.obs.operator.hold_delta = true;
    group.config.interval = seconds(60);
    group.until_action(120);
    group.run_ends(90_000, true, MIB);
    let decision = group.step();
    assert_eq!(decision.action, Action::StartRun { kind: RunKind::Round });
    assert!(decision.alternative.contains("90s") && decision.alternative.contains("delta.interval"), "{decision:?}");
}

#[test]
fn two_causes_that_disagree_on_returning_both_have_to_leave() {
    let mut group = Group::new();
    group.obs.usage_bytes_per_s = 510 * MIB;
    group.obs.flush_bytes_per_s = 100 * MIB;
    assert_eq!(group.step().action, Action::Switch { cause: Cause::Imbalance });
    // Now the link breaks too, and the clients grow quiet: imbalance would return, the link would not.
    group.link(false);
    group.obs.usage_bytes_per_s = 0;
    group.quiet_for(600);
    assert_eq!(group.weigh().holds, [Cause::LinkDown]);
    // The link comes back as the clients wake up: the link would return, imbalance would not.
    let mut group = Group::new();
    group.obs.usage_bytes_per_s = 510 * MIB;
    group.obs.flush_bytes_per_s = 100 * MIB;
    group.step();
    group.link(false);
    group.quiet_for(60);
    group.link(true);
    let decision = group.until_action(5);
    // It is measured once, as it may be another link now.
    assert_eq!((decision.action, decision.holds), (Action::None, vec![Cause::Imbalance]));
    group.obs.dirty_bytes = GIB;
    assert_eq!(group.until_action(5).action, Action::StartRun { kind: RunKind::Round });
    group.run_ends(10_000, true, GIB);
    group.quiet_for(600);
    // 1 GiB in 10 s is 102 MiB/s: 92 MiB/s leave the headroom that is asked for, kept for the dwell.
    group.obs.usage_bytes_per_s = 90 * MIB;
    let quiet = group.obs.now_ms;
    let decision = group.until_action(300);
    assert_eq!(decision.action, Action::StartRun { kind: RunKind::Round }, "{decision}");
    assert!(group.obs.now_ms - quiet >= 30_000);
}

#[test]
fn fill_leaves_below_its_own_threshold() {
    let mut group = Group::new();
    group.obs.span_bytes = GIB * 95 / 100;
    group.step();
    group.obs.usage_bytes_per_s = 0;
    group.obs.span_bytes = GIB * 6 / 10;
    group.quiet_for(600);
    assert_eq!(group.weigh().holds, [Cause::Fill]);
    group.obs.span_bytes = GIB * 4 / 10;
    assert_eq!(group.until_action(1).action, Action::StartRun { kind: RunKind::Final });
}

#[test]
fn a_group_of_few_blocks_is_tried_once_in_a_longest_dwell_by_any_schedule() {
    let mut group = Group::new();
    group.config.schedule = Schedule::Prompted;
    // Nothing went through when the journal filled, so nothing is known that usage could stay below.
    group.obs.flush_bytes_per_s = 0;
    group.obs.span_bytes = GIB * 95 / 100;
    assert_eq!(group.step().action, Action::Switch { cause: Cause::Fill });
    (group.obs.span_bytes, group.obs.dirty_bytes, group.obs.usage_bytes_per_s) = (0, MIB, MIB);
    let left = group.obs.now_ms;
    assert_eq!(group.until_action(3600).action, Action::StartRun { kind: RunKind::Round });
    assert!((group.obs.now_ms - left).abs_diff(600_000) <= 500);
    group.run_ends(100, true, MIB);
    assert_eq!(group.until_action(60).action, Action::StartRun { kind: RunKind::Final });
}

#[test]
fn a_slow_link_is_left_for_one_whose_probes_are_fast_for_a_while() {
    let mut group = Group::new();
    group.obs.oldest_sent_age_ms = Some(5000);
    assert_eq!(group.step().action, Action::Switch { cause: Cause::LinkSlow });
    group.obs.oldest_sent_age_ms = None;
    for rtt in [Some(1001), None] {
        group.obs.probe_rtt_ms = rtt;
        group.quiet_for(60);
    }
    group.obs.probe_rtt_ms = Some(1000);
    group.quiet_for(1);
    group.obs.probe_rtt_ms = Some(4000);
    group.quiet_for(1);
    group.obs.probe_rtt_ms = Some(1000);
    let fast = group.obs.now_ms;
    assert_eq!(group.until_action(5).action, Action::StartRun { kind: RunKind::Final });
    assert!(group.obs.now_ms - fast >= 2000);
}

#[test]
fn a_refusal_is_tried_again_and_less_and_less_often() {
    let mut group = Group::new();
    group.obs.refused = Some("unsupported record".into());
    assert_eq!(group.step().action, Action::Switch { cause: Cause::BackupRefused });
    group.obs.dirty_bytes = MIB;
    let mut tries = Vec::new();
    for _ in 0..6 {
        let from = group.obs.now_ms;
        assert_eq!(group.until_action(3600).action, Action::StartRun { kind: RunKind::Round });
        tries.push((group.obs.now_ms - from) / 1000);
        group.run_ends(0, false, 0);
        group.obs.last_run.as_mut().unwrap().refused = Some("no space: 1 GiB needed, 3 MiB free".into());
        group.obs.dirty_bytes = MIB;
    }
    assert_eq!(tries, [30, 30, 60, 120, 240, 480]);
    // The backup says that it can again, and the run shows it.
    group.obs.refused = None;
    group.until_action(3600);
    group.run_ends(100, true, 0);
    assert_eq!(group.until_action(5).action, Action::StartRun { kind: RunKind::Final });
}

#[test]
fn rounds_that_do_not_shrink_keep_the_group_in_delta_with_the_numbers() {
    let mut group = Group::in_delta(Cause::LinkDown);
    group.obs.dirty_bytes = 10 * GIB;
    group.obs.usage_bytes_per_s = 110 * MIB;
    // The link takes 100 MiB/s.
    let mut rounds = 0;
    let decision = loop {
        let decision = group.until_action(5);
        if decision.action != (Action::StartRun { kind: RunKind::Round }) {
            break decision;
        }
        rounds += 1;
        let ms = group.obs.run.unwrap().total_bytes * 1000 / (100 * MIB);
        group.run_ends(ms, true, ms * 110 * MIB / 1000);
    };
    assert_eq!((rounds, decision.cause), (3, Some(Cause::CannotConverge)));
    for part in ["3 rounds in succession", "(110 MiB/s)", "below 90.0 MiB/s", "by schedule"] {
        assert!(decision.alternative.contains(part), "{part} is not in: {}", decision.alternative);
    }
    group.quiet_for(600);
    // By schedule it still runs, and when the clients grow quiet for the dwell it returns.
    assert_eq!(group.until_action(3600).action, Action::StartRun { kind: RunKind::Round });
    group.run_ends(60_000, true, 4 * GIB);
    group.obs.usage_bytes_per_s = 10 * MIB;
    let quiet = group.obs.now_ms;
    assert_eq!(group.until_action(600).action, Action::StartRun { kind: RunKind::Final });
    assert!(group.obs.now_ms - quiet >= 30_000);
}

#[test]
fn shrinking_rounds_end_in_a_final_one() {
    let mut group = Group::in_delta(Cause::LinkDown);
    group.obs.dirty_bytes = 10 * GIB;
    group.obs.usage_bytes_per_s = 80 * MIB;
    while group.until_action(5).action == (Action::StartRun { kind: RunKind::Round }) {
        let ms = group.obs.run.unwrap().total_bytes * 1000 / (100 * MIB);
        group.run_ends(ms, true, ms * 80 * MIB / 1000);
    }
    assert_eq!(group.obs.phase, Phase::FinalRound);
    assert!(group.actions.len() < 20);
}

#[test]
fn what_fires_during_the_final_round_demotes_it() {
    for cause in [Cause::Fill, Cause::LinkDown, Cause::Operator, Cause::BackupRefused, Cause::Initial] {
        let mut group = Group::in_delta(Cause::Operator);
        group.obs.dirty_bytes = 0;
        assert_eq!(group.until_action(1).action, Action::StartRun { kind: RunKind::Final });
        group.quiet_for(5);
        match cause {
            Cause::Fill => group.obs.span_bytes = GIB * 95 / 100,
            Cause::LinkDown => group.link(false),
            Cause::Operator => group.obs.operator.hold_delta = true,
            Cause::BackupRefused => group.obs.refused = Some("failed sync".into()),
            _ => group.obs.needs_full = true,
        }
        assert_eq!(group.until_action(3).action, Action::Demote { cause });
        assert_eq!(group.obs.phase, Phase::Round);
        group.quiet_for(60);
    }
}

#[test]
fn a_demoted_return_waits_longer_and_rounds_go_on_meanwhile() {
    let mut group = Group::in_delta(Cause::Operator);
    group.until_action(1);
    group.run_ends(1000, true, 0);
    assert_eq!(group.until_action(1).action, Action::StartRun { kind: RunKind::Final });
    group.obs.span_bytes = GIB * 95 / 100;
    group.until_action(1);
    group.obs.span_bytes = 0;
    group.run_ends(1000, true, 10 * MIB);
    let from = group.obs.now_ms;
    let mut rounds = 0;
    while group.until_action(60).action == (Action::StartRun { kind: RunKind::Round }) {
        rounds += 1;
        group.run_ends(500, true, 10 * MIB);
    }
    assert_eq!(group.obs.phase, Phase::FinalRound);
    assert!(group.obs.now_ms - from >= 55_000, "{}", group.obs.now_ms - from);
    assert!((2..=4).contains(&rounds), "{rounds}");
}

#[test]
fn a_backup_without_an_image_gets_a_full_run_as_soon_as_the_link_is_up() {
    let mut group = Group::new();
    group.obs.needs_full = true;
    group.obs.dirty_bytes = GIB;
    assert_eq!(group.step().action, Action::Switch { cause: Cause::Initial });
    assert_eq!(group.until_action(1).action, Action::StartRun { kind: RunKind::Full });
    group.run_ends(60_000, false, 0);
    let from = group.obs.now_ms;
    assert_eq!(group.until_action(60).action, Action::StartRun { kind: RunKind::Full });
    assert_eq!(group.obs.now_ms - from, 2000);
    group.run_ends(60_000, true, 4 * MIB);
    group.obs.needs_full = false;
    // It says nothing of the link, since most blocks may have been equal: a round does.
    assert_eq!(group.until_action(1).action, Action::StartRun { kind: RunKind::Round });
    group.run_ends(100, true, 0);
    assert_eq!(group.until_action(1).action, Action::StartRun { kind: RunKind::Final });
    group.run_ends(100, true, 0);
    group.quiet_for(600);

    let mut group = Group::in_delta(Cause::Initial);
    group.obs.needs_full = true;
    group.config.schedule = Schedule::Prompted;
    group.link(false);
    group.quiet_for(60);
    group.link(true);
    assert_eq!(group.until_action(1).action, Action::StartRun { kind: RunKind::Full });
}

#[test]
fn a_link_that_comes_and_goes_is_waited_for_longer_each_time() {
    let mut group = Group::new();
    group.obs.usage_bytes_per_s = MIB;
    let mut waits = Vec::new();
    for _ in 0..6 {
        group.link(false);
        group.until_action(3);
        assert_eq!(group.obs.phase, Phase::Tracking);
        group.obs.dirty_bytes = 0;
        group.link(true);
        let up = group.obs.now_ms;
        group.until_action(3600);
        waits.push((group.obs.now_ms - up) / 1000);
        group.run_ends(100, true, 0);
        group.quiet_for(20);
    }
    // After the settling time of 2 s.
    assert_eq!(waits, [2, 62, 122, 242, 482, 602]);
}

#[test]
fn a_cause_that_is_switched_off_while_it_holds_lets_go() {
    for cause in [Cause::LinkSlow, Cause::Imbalance, Cause::Fill, Cause::CannotConverge, Cause::Operator] {
        let mut group = Group::in_delta(cause);
        group.obs.operator.hold_delta = true;
        group.obs.usage_bytes_per_s = GIB;
        group.obs.dirty_bytes = 0;
        group.obs.probe_rtt_ms = None;
        if cause != Cause::Operator {
            group.obs.operator.hold_delta = false;
        }
        group.quiet_for(60);
        group.config.criteria = Criteria::all().without(cause);
        assert_eq!(group.until_action(5).action, Action::StartRun { kind: RunKind::Final }, "{cause}");
    }
}

#[test]
fn a_throttled_stream_has_no_more_headroom_than_it_is_given() {
    let mut group = Group::in_delta(Cause::Imbalance);
    group.config.stream_bytes_per_second = 20 * MIB;
    group.obs.usage_bytes_per_s = 50 * MIB;
    group.obs.dirty_bytes = GIB;
    // The link takes 100 MiB/s, which is no use to a stream of 20 MiB/s.
    assert_eq!(group.until_action(5).action, Action::StartRun { kind: RunKind::Round });
    group.run_ends(10_240, true, 0);
    group.quiet_for(600);
    group.obs.usage_bytes_per_s = 10 * MIB;
    assert_eq!(group.until_action(120).action, Action::StartRun { kind: RunKind::Final });
}
