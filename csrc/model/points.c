#include "model/layer.h"

/* Watchers of all points, numbered point by point. */
static mq_watcher *watcher_at(mq_point **points, size_t index)
{
    return &points[index / MQ_POINT_WATCHERS]->watchers[index % MQ_POINT_WATCHERS];
}

static const mq_watcher *leader_of(const mq_watcher *watcher)
{
    return watcher->leader != NULL ? watcher->leader : watcher;
}

/* Whether the same rows are seen at both: of one tensor, prepared and, where that is what is watched, rounded alike. */
static int same_rows(const mq_point *a, const mq_point *b)
{
    const mq_quantizer *first = a->quantizer, *second = b->quantizer;
    if (a->site != b->site || a->watch_quantized != b->watch_quantized) return 0;
    const int changed = (first != NULL && (a->watch_quantized || mq_quantizer_prepares(first))) ||
                        (second != NULL && (b->watch_quantized || mq_quantizer_prepares(second)));
    return !changed || (first != NULL && second != NULL && mq_quantizer_same(first, second));
}

static const mq_watcher *find_leader(mq_point **points, size_t index)
{
    const mq_watcher *watcher = watcher_at(points, index);
    for (size_t i = 0; i < index; i++) {
        const mq_watcher *other = watcher_at(points, i);
        const mq_point *point = points[i / MQ_POINT_WATCHERS], *own = points[index / MQ_POINT_WATCHERS];
        if (other->watch != NULL && same_rows(point, own) && mq_calib_same_kind(other->calib, watcher->calib))
            return other;
    }
    return NULL;
}

int mq_points_begin(mq_point **points, size_t count, mq_spare *spare, mq_error *err)
{
    for (size_t i = 0; i < count * MQ_POINT_WATCHERS; i++) {
        watcher_at(points, i)->leader = NULL;
        watcher_at(points, i)->watch = NULL;
    }
    for (size_t i = 0; i < count * MQ_POINT_WATCHERS; i++) {
        mq_watcher *watcher = watcher_at(points, i);
        if (watcher->calib == NULL) continue;
        watcher->leader = find_leader(points, i);
        if (watcher->leader != NULL) continue;
        watcher->watch = mq_calib_new_like(watcher->calib, err);
        if (watcher->watch != NULL) {
            watcher->watch->spare = spare;
            continue;
        }
        mq_points_end(points, count, 0, NULL);
        return MQ_ERR_MEMORY;
    }
    return MQ_OK;
}

/* A calibrator that sits on several siblings gets their one set of statistics once. */
static int merged_before(mq_point **points, size_t index)
{
    const mq_watcher *watcher = watcher_at(points, index);
    for (size_t i = 0; i < index; i++) {
        const mq_watcher *other = watcher_at(points, i);
        if (other->calib == watcher->calib && leader_of(other) == leader_of(watcher)) return 1;
    }
    return 0;
}

int mq_points_end(mq_point **points, size_t count, int keep, mq_error *err)
{
    int rc = MQ_OK;
    for (size_t i = 0; i < count * MQ_POINT_WATCHERS && keep && rc == MQ_OK; i++) {
        mq_watcher *watcher = watcher_at(points, i);
        if (watcher->calib == NULL || merged_before(points, i)) continue;
        rc = mq_calib_merge(watcher->calib, leader_of(watcher)->watch, err);
    }
    for (size_t i = 0; i < count * MQ_POINT_WATCHERS; i++) {
        mq_calib_free(watcher_at(points, i)->watch);
        watcher_at(points, i)->watch = NULL;
        watcher_at(points, i)->leader = NULL;
    }
    return rc;
}

int mq_point_collect(mq_point *point, const mq_calib_rows *rows, mq_error *err)
{
    int rc = MQ_OK;
    for (int i = 0; rc == MQ_OK && i < MQ_POINT_WATCHERS; i++)
        if (point->watchers[i].watch != NULL) rc = mq_calib_collect(point->watchers[i].watch, rows, err);
    return rc;
}

int mq_point_has_calib(const mq_point *point)
{
    int found = 0;
    for (int i = 0; i < MQ_POINT_WATCHERS; i++) found |= point->watchers[i].calib != NULL;
    return found;
}

int mq_point_is_watched(const mq_point *point)
{
    int found = 0;
    for (int i = 0; i < MQ_POINT_WATCHERS; i++) found |= point->watchers[i].watch != NULL;
    return found;
}

int mq_point_by_group(const mq_point *point)
{
    int found = 0;
    for (int i = 0; i < MQ_POINT_WATCHERS; i++) {
        const mq_calib *watch = point->watchers[i].watch;
        found |= watch != NULL && watch->kind->by_group && watch->option == 1;
    }
    return found;
}

int mq_points_settle(mq_point **points, size_t count, mq_error *err)
{
    int rc = MQ_OK;
    for (size_t i = 0; rc == MQ_OK && i < count * MQ_POINT_WATCHERS; i++)
        if (watcher_at(points, i)->watch != NULL) rc = mq_calib_settle(watcher_at(points, i)->watch, 0, err);
    return rc;
}

int mq_points_must_settle(mq_point **points, size_t count)
{
    int found = 0;
    for (size_t i = 0; i < count * MQ_POINT_WATCHERS; i++) {
        const mq_calib *watch = watcher_at(points, i)->watch;
        found |= watch != NULL && watch->kind->settle != NULL;
    }
    return found;
}
